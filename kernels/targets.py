"""The configurations in which every kernel is compiled for GPUs that are not at hand.

They are those of video models: by dtype, sizes and options, as Triton specializes the call on them.
A stride of 1 is a constant, and strides and addresses that are multiples of 16 are aligned.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import product
from typing import Any

from . import attention, encode_rows, permute_copy, residual_norm, short_attention, text_attention
from .compilation import Specialization
from .gpus import TARGETS
from .residual_norm import MAX_TERMS
from .rows import MAX_CHANNELS, configure_rows

Values = Mapping[str, Any]
ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
INTEGERS = {1: "*u8", 2: "*i16", 4: "*i32"}
CONTIGUOUS = {"q_d": 1, "k_d": 1, "v_d": 1, "o_d": 1}
NOT_ALIGNED = ("mask", "lengths", "m_n", "m_h", "m_t", "m_s")
MASKS = {"mask of bools": {"MASK": 1}, "mask that is added": {"MASK": 2}}
MASKS_OR_LENGTHS: Mapping[str, Values] = {**MASKS, "lengths": {"LENGTHS": True}}
SHORT_OPTIONS: Mapping[str, Values] = {
    **MASKS,
    "RMS norm": {"NORM": True},
    "rotary, halves": {"PAIRS": 1},
    "rotary, neighbors": {"PAIRS": 2},
    "all": {"MASK": 1, "NORM": True, "PAIRS": 1},
    "channels apart": {"q_d": None, "k_d": None, "v_d": None},
}
NORM_ONLY: Values = {"NORM": 1, "SCALE": True, "SHIFT": True}
NORM_OPTIONS: Mapping[str, Values] = {
    "fp8": {"FORM0": 2, "GATED0": True},
    "RMS norm": {"FORM0": 1, "NORM": 2, "WEIGHT": True},
    "read": {"FORM0": 2, "GATED0": True, "NORM": 0, "WRITE_N": False},
    "all": {
        **{
            f"{name}{at}": value
            for at in range(3)
            for name, value in (("FORM", 2), ("GATED", True))
        },
        "WEIGHT": True,
        "BIAS": True,
    },
}


def _specialize(
    label: str,
    kernel: Any,
    constants: Values,
    types: Mapping[str, str],
    *,
    aligned: Collection[str] = (),
    targets: tuple[str, ...] = (),
) -> Specialization:
    """Returns a specialization; strides, which have no entry in `types`, are 64-bit integers.

    `constants` include num_warps and perhaps num_stages. Constants among `aligned` are left out.
    """
    names = kernel.arg_names
    values = dict(constants)
    num_warps, num_stages = values.pop("num_warps"), values.pop("num_stages", 2)
    signature = {n: "constexpr" if n in values else types.get(n, "i64") for n in names}
    kept = tuple(n for n in names if n in aligned and n not in values)
    return Specialization(label, kernel, signature, values, num_warps, num_stages, kept, targets)


def _attention() -> Iterator[Specialization]:
    for dtype, D in product(("bf16", "fp16"), (64, 72, 80, 96, 128)):
        yield _specialize_attention(dtype, D)
    for D, (label, options) in product((64, 72, 128), MASKS_OR_LENGTHS.items()):
        yield _specialize_attention("bf16", D, label, options)
    yield _specialize_attention("fp32", 64)


def _specialize_attention(
    dtype: str, D: int, label: str = "", options: Values | None = None
) -> Specialization:
    kernel = attention.attention_kernel
    constants = {
        "D": D,
        "MASK": 0,
        "LENGTHS": False,
        "EXACT": False,
        **CONTIGUOUS,
        **(options or {}),
    }
    constants |= attention.configure(1024, 1024, D, ITEMSIZES[dtype], constants["MASK"])
    types = _type_attention(kernel, dtype, constants["MASK"], ("H", "T", "S"))
    aligned = _find_aligned(kernel)
    return _specialize(f"{dtype} D={D} {label}".strip(), kernel, constants, types, aligned=aligned)


def _type_attention(
    kernel: Any, dtype: str, mask: int, sizes: Collection[str]
) -> Mapping[str, str]:
    types = dict.fromkeys(kernel.arg_names[:4], f"*{dtype}") | dict.fromkeys(sizes, "i32")
    types |= {"mask": _type_mask(mask, dtype), "lengths": "*i64", "scale": "fp32"}
    return types


def _type_mask(mask: int, dtype: str) -> str:
    return "*i1" if mask == 1 else f"*{dtype}"


def _find_aligned(kernel: Any) -> list[str]:
    """Returns tensors and strides, but those of masks and lengths."""
    names = kernel.arg_names
    return [name for name in names[: names.index("H")] if name not in NOT_ALIGNED]


def _short_attention() -> Iterator[Specialization]:
    for dtype, T, D in product(("bf16", "fp16"), (8, 16, 32, 64), (32, 64, 72, 96, 128)):
        yield _specialize_short_attention(dtype, T, D)
    for T, (label, options) in product((16, 30, 64), SHORT_OPTIONS.items()):
        yield _specialize_short_attention("bf16", T, 72, label, options)
    for T in (16, 32):
        yield _specialize_short_attention("fp32", T, 64)


def _specialize_short_attention(
    dtype: str, T: int, D: int, label: str = "", options: Values | None = None
) -> Specialization:
    """Returns a specialization; an option of None is an argument that is no constant."""
    kernel = short_attention.short_attention_kernel
    constants = {"H": 16, "T": T, "S": T, "D": D, "MASK": 0, "NORM": False, "PAIRS": 0}
    constants |= {"EXACT": False, **CONTIGUOUS, **(options or {})}
    norms, turns = bool(constants["NORM"]), constants["PAIRS"] != 0
    constants |= short_attention.configure(
        T, T, D, ITEMSIZES[dtype], norms, turns, is_apart=constants["q_d"] is None
    )
    types = dict.fromkeys(kernel.arg_names[:9], f"*{dtype}")
    types |= {"scale": "fp32", "eps": "fp32", "P": "i32", "num_sequences": "i32"}
    types["mask"] = _type_mask(constants["MASK"], dtype)
    constants = {name: value for name, value in constants.items() if value is not None}
    return _specialize(f"{dtype} T={T} D={D} {label}".strip(), kernel, constants, types)


def _text_attention() -> Iterator[Specialization]:
    for dtype, S, D in product(("bf16", "fp16"), (77, 120, 256, 300, 512), (64, 72, 128)):
        yield from _specialize_text_attention(dtype, S, D)
    for S, (label, options) in product((120, 300), MASKS_OR_LENGTHS.items()):
        yield from _specialize_text_attention("bf16", S, 72, label, options)
    yield from _specialize_text_attention("fp32", 120, 64)


def _specialize_text_attention(
    dtype: str, S: int, D: int, label: str = "", options: Values | None = None
) -> Iterator[Specialization]:
    """Yields a specialization for each kind of GPU that the keys and values fit on."""
    kernel, itemsize = text_attention.text_attention_kernel, ITEMSIZES[dtype]
    constants = {
        "D": D,
        "MASK": 0,
        "LENGTHS": False,
        "EXACT": False,
        **CONTIGUOUS,
        **(options or {}),
    }
    types = _type_attention(kernel, dtype, constants["MASK"], ("H", "T", "S", "repeats"))
    fitting = [target for target in TARGETS if text_attention.fits(S, D, itemsize, target)]
    for backend in sorted({target.gpu.backend for target in fitting}):
        yield _specialize(
            f"{dtype} S={S} D={D} {label}".strip(),
            kernel,
            constants | text_attention.configure(1024, S, D, itemsize, backend, constants["MASK"]),
            types,
            aligned=_find_aligned(kernel),
            targets=tuple(target.name for target in fitting if target.gpu.backend == backend),
        )


def _residual_norm() -> Iterator[Specialization]:
    for dtype, C in product(("bf16", "fp32"), (64, 1152, 1920, 3072, 5120, MAX_CHANNELS)):
        yield _specialize_residual_norm(dtype, C, "norm", {})
        yield _specialize_residual_norm(dtype, C, "gate norm", {"FORM0": 1, "GATED0": True})
    for C, (label, options) in product((1152, 3072, 5120), NORM_OPTIONS.items()):
        yield _specialize_residual_norm("bf16", C, label, options)


def _specialize_residual_norm(dtype: str, C: int, label: str, options: Values) -> Specialization:
    kernel = residual_norm.residual_norm_kernel
    names = kernel.arg_names
    constants: dict[str, Any] = dict.fromkeys(names[names.index("FORM0") :], False)
    constants |= {"WRITE_N": True, "C": C, **configure_rows(C), **NORM_ONLY, **options}
    constants["WRITE_Y"] = bool(constants["FORM0"])
    constants |= {name: 1 for name in names if name.endswith("_c")}
    types = dict.fromkeys(names[: names.index("bias") + 1], f"*{dtype}")
    for at in range(MAX_TERMS):
        types[f"cut_scale{at}"] = "*fp32"
        if constants[f"FORM{at}"] == 2:
            types[f"cut{at}"] = "*u8"
    aligned = {*types, *(name for name in names if name.endswith(("_i", "_j", "_k")))}
    aligned -= {f"cut_scale{at}_{d}" for at in range(MAX_TERMS) for d in "ijk"}
    types |= dict.fromkeys(("factor0", "factor1", "factor2", "offset", "eps"), "fp32")
    types |= dict.fromkeys(("num_rows", "J", "K"), "i32")
    return _specialize(f"{dtype} C={C} {label}", kernel, constants, types, aligned=aligned)


def _encode_rows() -> Iterator[Specialization]:
    for dtype, C in product(("fp32", "bf16", "fp16"), (1152, 1920, 3072, 5120)):
        yield _specialize_encode_rows(dtype, C)
    yield _specialize_encode_rows("bf16", 1152, is_apart=True)


def _specialize_encode_rows(dtype: str, C: int, *, is_apart: bool = False) -> Specialization:
    constants = {"C": C, **configure_rows(C)} | ({} if is_apart else {"x_c": 1, "v_c": 1})
    types = {"x": f"*{dtype}", "values": "*u8", "scales": "*fp32"}
    aligned = {*types, *(() if is_apart else ("x_i", "x_j", "x_k", "v_i", "v_j", "v_k"))}
    types |= dict.fromkeys(("num_rows", "J", "K"), "i32")
    label = f"{dtype} C={C}{' apart' * is_apart}"
    return _specialize(label, encode_rows.encode_rows_kernel, constants, types, aligned=aligned)


def _permute_copy() -> Iterator[Specialization]:
    kernel = permute_copy.permute_copy_kernel
    for is_turned, itemsize in product((False, True), INTEGERS):
        constants = permute_copy.configure(1024, 1152, itemsize, is_turned=is_turned)
        constants |= {"o_b": 1, ("x_a" if is_turned else "x_b"): 1}
        types = dict.fromkeys(("x", "out"), INTEGERS[itemsize])
        types |= dict.fromkeys(("A", "B", "tiles_a", "tiles_b"), "i32")
        aligned = [name for name in kernel.arg_names if not name.startswith("tiles")]
        label = f"{8 * itemsize} bits, {'turned' if is_turned else 'rows'}"
        yield _specialize(label, kernel, constants, types, aligned=aligned)


SPECIALIZATIONS: Mapping[str, Callable[[], Iterator[Specialization]]] = {
    "attention": _attention,
    "encode_rows": _encode_rows,
    "permute_copy": _permute_copy,
    "residual_norm": _residual_norm,
    "short_attention": _short_attention,
    "text_attention": _text_attention,
}
"""Kernel -> its specializations; :mod:`~pabc.kernels.joint_norm` launches that of residual_norm."""
