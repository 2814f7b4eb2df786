"""Residual adds and the normalization after them, one pass over memory: adaLN and cache reads.

    R  rows: all dimensions but the last; C  channels, the last one

    y = x + sum of factor * gate * cut        up to 3 cuts, as they are or in fp8
    n = norm(y) * weight + bias               layer norm, RMS norm or none
    n = n * (offset + scale) + shift          modulation

One program holds whole rows: each element of x and of the cuts is read once, whatever their
strides, each of y and n written once. In between all is float32: nothing is rounded but y and n.
Gates, scales and shifts are broadcast, as (B, 1, C) is to (B, T, C).

    x = [1, 3], cut = [2, 4], gate = [0.5, 1]:  y = [2, 7];  layer norm: [-1, 1];
    scale = [1, 0], offset = 1, shift = [0, 5]:  n = [-2, 6]

Cuts in fp8 are float8_e4m3fn, decoded bit by bit: not every GPU knows this type.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import INTERPRETED, next_power_of_2
from .registration import check, register
from .rows import decode_e4m3, load_rows, merge_rows, store_rows
from .targets import Specialization

MAX_CHANNELS = 16384
MAX_TERMS = 3
MAX_LEADING = 3
"""Dimensions of rows, after those are merged that all operands step through evenly."""
NORMS = ("none", "layer", "rms")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FP8 = torch.float8_e4m3fn
ELEMENTS = 2048
"""That one program takes at least, by more than one row where rows are short."""


def residual_norm_reference(
    x: Tensor,
    cuts: Sequence[Tensor],
    cut_scales: Sequence[Tensor | None],
    gates: Sequence[Tensor | None],
    factors: Sequence[float],
    norm: str = "layer",
    weight_C: Tensor | None = None,
    bias_C: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    offset: float = 1.0,
    eps: float = 1e-6,
    *,
    y_dtype: torch.dtype | None = None,
    n_dtype: torch.dtype | None = None,
    y_like_x: bool = False,
    n_like_x: bool = False,
) -> list[Tensor]:
    """The same by PyTorch's ops, in float32."""
    y = x.float()
    for cut, cut_scale, gate, factor in zip(cuts, cut_scales, gates, factors, strict=True):
        term = cut.float() * factor
        for by in (cut_scale, gate):
            term = term if by is None else term * by.float()
        y = y + term
    n = _normalize(y, norm, weight_C, bias_C, eps)
    if scale is not None:
        n = n * (offset + scale.float())
    if shift is not None:
        n = n + shift.float()
    outputs = _allocate(x, y_dtype=y_dtype, n_dtype=n_dtype, y_like_x=y_like_x, n_like_x=n_like_x)
    wanted = [found for found, d in ((y, y_dtype), (n, n_dtype)) if d is not None]
    return [out.copy_(found) for out, found in zip(outputs, wanted, strict=True)]


def _normalize(
    y: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    if norm == "layer":
        y = y - y.mean(-1, keepdim=True)
    if norm != "none":
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.float()
    return y if bias is None else y + bias.float()


@triton.jit
def _load_term(
    cut, cut_scale, gate, factor, i, j, k, columns, valid, is_row,
    c_i, c_j, c_k, c_c, s_i, s_j, s_k, g_i, g_j, g_k, g_c,
    FORM: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """factor * gate * cut, in float32. FORM 1: the cut as it is, 2: in fp8."""
    term = load_rows(cut, i, j, k, c_i, c_j, c_k, c_c, columns, valid)
    if FORM == 2:
        by = tl.load(cut_scale + i * s_i + j * s_j + k * s_k, mask=is_row, other=0.0)
        term = decode_e4m3(term) * by.to(tl.float32)[:, None]
    else:
        term = term.to(tl.float32)
    if GATED:
        term *= load_rows(gate, i, j, k, g_i, g_j, g_k, g_c, columns, valid).to(tl.float32)
    return term * factor


@triton.jit
def _residual_norm_kernel(
    x, cut0, cut1, cut2, cut_scale0, cut_scale1, cut_scale2, gate0, gate1, gate2,
    scale, shift, y, n, weight, bias,
    x_i, x_j, x_k, x_c, cut0_i, cut0_j, cut0_k, cut0_c, cut1_i, cut1_j, cut1_k, cut1_c,
    cut2_i, cut2_j, cut2_k, cut2_c, cut_scale0_i, cut_scale0_j, cut_scale0_k, cut_scale0_c,
    cut_scale1_i, cut_scale1_j, cut_scale1_k, cut_scale1_c,
    cut_scale2_i, cut_scale2_j, cut_scale2_k, cut_scale2_c, gate0_i, gate0_j, gate0_k, gate0_c,
    gate1_i, gate1_j, gate1_k, gate1_c, gate2_i, gate2_j, gate2_k, gate2_c,
    scale_i, scale_j, scale_k, scale_c, shift_i, shift_j, shift_k, shift_c, y_i, y_j, y_k, y_c,
    n_i, n_j, n_k, n_c,
    factor0, factor1, factor2, offset, eps, num_rows, J, K,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    FORM0: tl.constexpr, FORM1: tl.constexpr, FORM2: tl.constexpr,
    GATED0: tl.constexpr, GATED1: tl.constexpr, GATED2: tl.constexpr,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, WRITE_Y: tl.constexpr, WRITE_N: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """ROWS rows of (I, J, K) of them."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    is_row, is_column = row < num_rows, columns < C
    valid = is_row[:, None] & is_column[None, :]
    i, j, k = row // K // J, row // K % J, row % K
    i, j, k, columns = i.to(tl.int64), j.to(tl.int64), k.to(tl.int64), columns.to(tl.int64)

    total = load_rows(x, i, j, k, x_i, x_j, x_k, x_c, columns, valid).to(tl.float32)
    if FORM0 != 0:
        total += _load_term(
            cut0, cut_scale0, gate0, factor0, i, j, k, columns, valid, is_row,
            cut0_i, cut0_j, cut0_k, cut0_c, cut_scale0_i, cut_scale0_j, cut_scale0_k,
            gate0_i, gate0_j, gate0_k, gate0_c, FORM0, GATED0,
        )  # fmt: skip
    if FORM1 != 0:
        total += _load_term(
            cut1, cut_scale1, gate1, factor1, i, j, k, columns, valid, is_row,
            cut1_i, cut1_j, cut1_k, cut1_c, cut_scale1_i, cut_scale1_j, cut_scale1_k,
            gate1_i, gate1_j, gate1_k, gate1_c, FORM1, GATED1,
        )  # fmt: skip
    if FORM2 != 0:
        total += _load_term(
            cut2, cut_scale2, gate2, factor2, i, j, k, columns, valid, is_row,
            cut2_i, cut2_j, cut2_k, cut2_c, cut_scale2_i, cut_scale2_j, cut_scale2_k,
            gate2_i, gate2_j, gate2_k, gate2_c, FORM2, GATED2,
        )  # fmt: skip
    if WRITE_Y:
        store_rows(y, total, i, j, k, y_i, y_j, y_k, y_c, columns, valid, EXACT)
    if WRITE_N:
        if NORM == 1:
            total -= tl.sum(total, 1)[:, None] / C
            total = tl.where(valid, total, 0.0)
        if NORM != 0:
            total *= tl.rsqrt(tl.sum(total * total, 1)[:, None] / C + eps)
        if WEIGHT:
            by = tl.load(weight + columns, mask=is_column, other=0.0)
            total *= by.to(tl.float32)[None, :]
        if BIAS:
            by = tl.load(bias + columns, mask=is_column, other=0.0)
            total += by.to(tl.float32)[None, :]
        if SCALE:
            by = load_rows(scale, i, j, k, scale_i, scale_j, scale_k, scale_c, columns, valid)
            total *= offset + by.to(tl.float32)
        if SHIFT:
            by = load_rows(shift, i, j, k, shift_i, shift_j, shift_k, shift_c, columns, valid)
            total += by.to(tl.float32)
        store_rows(n, total, i, j, k, n_i, n_j, n_k, n_c, columns, valid, EXACT)


def residual_norm(
    x: Tensor,
    cuts: Sequence[Tensor],
    cut_scales: Sequence[Tensor | None],
    gates: Sequence[Tensor | None],
    factors: Sequence[float],
    norm: str = "layer",
    weight_C: Tensor | None = None,
    bias_C: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    offset: float = 1.0,
    eps: float = 1e-6,
    *,
    y_dtype: torch.dtype | None = None,
    n_dtype: torch.dtype | None = None,
    y_like_x: bool = False,
    n_like_x: bool = False,
) -> list[Tensor]:
    """Residual adds and the norm after them, by the kernel.

    Args:
        x: (..., C) at any strides. All others are broadcast to its shape, at any strides.
        cuts, cut_scales, gates, factors: of the terms, up to :data:`MAX_TERMS`. A cut in
            float8_e4m3fn has a scale (..., 1), others have none.
        norm: one of :data:`NORMS`.
        y_dtype, n_dtype: of y and n, each of which is computed where it has a dtype.
        y_like_x, n_like_x: in memory as `torch.empty_like(x)` is; else contiguous.

    Returns:
        y, n, or both.

    Raises:
        ValueError: naming the argument, what was expected and what was found.
    """
    _check(x, cuts, cut_scales, gates, factors, norm, weight_C, bias_C, scale, shift)
    outputs = _allocate(x, y_dtype=y_dtype, n_dtype=n_dtype, y_like_x=y_like_x, n_like_x=n_like_x)
    for name, dtype in (("y_dtype", y_dtype), ("n_dtype", n_dtype)):
        _need(name, f"one of {FLOATS}", dtype, dtype in (None, *FLOATS))
    _need("y_dtype, n_dtype", "one of them", None, bool(outputs))
    if x.numel() == 0:
        return outputs
    rest = [None] * (MAX_TERMS - len(cuts))
    y = None if y_dtype is None else outputs[0]
    n = None if n_dtype is None else outputs[-1]
    operands = [x, *cuts, *rest, *cut_scales, *rest, *gates, *rest, scale, shift, y, n]
    sizes, strides = merge_rows(x.shape, operands)
    _need("x", f"at most {MAX_LEADING} dimensions of rows", sizes, len(sizes) <= MAX_LEADING)
    missing = MAX_LEADING - len(sizes)
    _, J, K = [1] * missing + sizes
    num_rows, C = x.numel() // x.shape[-1], x.shape[-1]
    taken = configure(C)
    _residual_norm_kernel[(triton.cdiv(num_rows, taken["ROWS"]),)](
        *(x if operand is None else _as_bits(operand) for operand in operands),
        x if weight_C is None else weight_C.contiguous(),
        x if bias_C is None else bias_C.contiguous(),
        *(step for steps in strides for step in (0,) * missing + steps),
        *factors, *(1.0 for _ in rest), offset, eps, num_rows, J, K,
        C=C, NORM=NORMS.index(norm), EXACT=INTERPRETED,
        **_find_forms(cuts, gates),
        WEIGHT=weight_C is not None, BIAS=bias_C is not None,
        SCALE=scale is not None, SHIFT=shift is not None,
        WRITE_Y=y is not None, WRITE_N=n is not None, **taken,
    )  # fmt: skip
    return outputs


def configure(C: int) -> dict[str, int]:
    """How many rows one program takes, and by how many warps: 16 elements a thread."""
    columns = max(next_power_of_2(C), 16)
    rows = max(ELEMENTS // columns, 1)
    return {
        "ROWS": rows,
        "COLUMNS": columns,
        "num_warps": min(rows * columns // 512, 16),
    }


def _as_bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == FP8 else x


def _find_forms(cuts: Sequence[Tensor], gates: Sequence[Tensor | None]) -> dict[str, int]:
    found: dict[str, int] = {}
    for at in range(MAX_TERMS):
        is_there = at < len(cuts)
        found[f"FORM{at}"] = 0 if not is_there else 2 if cuts[at].dtype == FP8 else 1
        found[f"GATED{at}"] = is_there and gates[at] is not None
    return found


def _need(argument: str, expected: str, found: object, is_right: bool) -> None:
    check("residual_norm", argument, expected, found, is_right)


def _check(
    x: Tensor,
    cuts: Sequence[Tensor],
    cut_scales: Sequence[Tensor | None],
    gates: Sequence[Tensor | None],
    factors: Sequence[float],
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    _need("x", "a dimension or more", x.dim(), x.dim() > 0)
    C = x.shape[-1]
    _need("x", f"one of {FLOATS}", x.dtype, x.dtype in FLOATS)
    _need("x", f"up to {MAX_CHANNELS} channels", C, C <= MAX_CHANNELS)
    _need("norm", f"one of {NORMS}", norm, norm in NORMS)
    nums = {"cut_scales": len(cut_scales), "gates": len(gates), "factors": len(factors)}
    _need("cuts", f"at most {MAX_TERMS}", len(cuts), len(cuts) <= MAX_TERMS)
    for name, num in nums.items():
        _need(name, f"one for each cut, {len(cuts)}", num, num == len(cuts))
    for name, of_C in (("weight", weight), ("bias", bias)):
        if of_C is not None:
            _need(name, f"({C},)", tuple(of_C.shape), of_C.shape == (C,))
    for cut, cut_scale in zip(cuts, cut_scales, strict=True):
        _need("cuts", f"one of {(*FLOATS, FP8)}", cut.dtype, cut.dtype in (*FLOATS, FP8))
        is_scaled = cut_scale is not None
        _need(
            "cut_scales",
            "given for fp8, and only there",
            is_scaled,
            is_scaled == (cut.dtype == FP8),
        )
        _need_like("cuts", cut, x)
        if cut_scale is not None:
            _need("cut_scales", "(..., 1)", tuple(cut_scale.shape), cut_scale.shape[-1:] == (1,))
    others = {"cut_scales": cut_scales, "gates": gates, "scale": [scale], "shift": [shift]}
    others |= {"weight": [weight], "bias": [bias]}
    for name, tensors in others.items():
        for tensor in tensors:
            if tensor is not None:
                _need(name, f"one of {FLOATS}", tensor.dtype, tensor.dtype in FLOATS)
                _need_like(name, tensor, x)


def _need_like(name: str, tensor: Tensor, x: Tensor) -> None:
    _need(name, f"on {x.device}", tensor.device, tensor.device == x.device)
    sizes = (*([1] * (x.dim() - tensor.dim())), *tensor.shape)
    fits = len(sizes) == x.dim() and all(a in (1, b) for a, b in zip(sizes, x.shape, strict=True))
    _need(name, f"broadcast to {tuple(x.shape)}", tuple(tensor.shape), fits)


def _allocate(
    x: Tensor,
    *_: object,
    y_dtype: torch.dtype | None = None,
    n_dtype: torch.dtype | None = None,
    y_like_x: bool = False,
    n_like_x: bool = False,
    **__: object,
) -> list[Tensor]:
    wanted = ((y_dtype, y_like_x), (n_dtype, n_like_x))
    formats = (torch.contiguous_format, torch.preserve_format)
    return [
        torch.empty_like(x, dtype=dtype, memory_format=formats[is_like_x])
        for dtype, is_like_x in wanted
        if dtype is not None
    ]


SCHEMA = (
    "(Tensor x, Tensor[] cuts, Tensor?[] cut_scales, Tensor?[] gates, float[] factors, "
    'str norm="layer", Tensor? weight=None, Tensor? bias=None, Tensor? scale=None, '
    "Tensor? shift=None, float offset=1.0, float eps=1e-6, *, ScalarType? y_dtype=None, "
    "ScalarType? n_dtype=None, bool y_like_x=False, bool n_like_x=False) -> Tensor[]"
)
OP = register(
    "residual_norm",
    SCHEMA,
    launch=residual_norm,
    reference=residual_norm_reference,
    allocate=_allocate,
)


def specializations() -> Iterator[Specialization]:
    """What is compiled: widths of video models, with their dtypes and options."""
    for dtype, C in product(("bf16", "fp32"), (64, 1152, 1920, 3072, 5120, MAX_CHANNELS)):
        yield _specialize(dtype, C, "norm", NORM_ONLY)
        yield _specialize(dtype, C, "gate norm", {**NORM_ONLY, "FORM0": 1, "GATED0": True})
    for C, (name, others) in product((1152, 3072, 5120), OPTIONS.items()):
        yield _specialize("bf16", C, name, {**NORM_ONLY, **others})


NORM_ONLY = {"NORM": 1, "SCALE": True, "SHIFT": True}
ALL = {f"{name}{at}": value for at in range(3) for name, value in (("FORM", 2), ("GATED", True))}
OPTIONS = {
    "fp8": {"FORM0": 2, "GATED0": True},
    "RMS norm": {"FORM0": 1, "NORM": 2, "WEIGHT": True},
    "read": {"FORM0": 2, "GATED0": True, "NORM": 0, "WRITE_N": False},
    "all": {**ALL, "WEIGHT": True, "BIAS": True},
}


def _specialize(dtype: str, C: int, label: str, options: Mapping[str, int]) -> Specialization:
    names = _residual_norm_kernel.arg_names
    taken = configure(C)
    num_warps = taken.pop("num_warps")
    flags = names[names.index("FORM0") :]
    constants = {**dict.fromkeys(flags, False), "WRITE_N": True, "C": C, **taken, **options}
    constants["WRITE_Y"] = bool(constants["FORM0"])
    constants |= {name: 1 for name in names if name.endswith("_c")}
    pointers = dict.fromkeys(names[: names.index("bias") + 1], f"*{dtype}")
    for at in range(MAX_TERMS):
        pointers[f"cut_scale{at}"] = "*fp32"
        if constants[f"FORM{at}"] == 2:
            pointers[f"cut{at}"] = "*u8"
    floats = dict.fromkeys(("factor0", "factor1", "factor2", "offset", "eps"), "fp32")
    types = {**pointers, **floats, "num_rows": "i32", "J": "i32", "K": "i32"}
    signature = {n: "constexpr" if n in constants else types.get(n, "i64") for n in names}
    scales = {f"cut_scale{at}_{d}" for at in range(MAX_TERMS) for d in "ijk"}
    steps = {name for name, kind in signature.items() if kind == "i64"} - scales
    aligned = tuple(name for name in names if name in pointers or name in steps)
    return Specialization(
        f"{dtype} C={C} {label}", _residual_norm_kernel, signature, constants, num_warps,
        aligned=aligned,
    )  # fmt: skip
