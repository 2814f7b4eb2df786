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
from typing import Any

import torch
import triton
from torch import Tensor

from .arithmetic import INTERPRETED, next_power_of_2
from .registration import register
from .residual_norm_arguments import (
    FLOATS,
    FP8,
    MAX_CHANNELS,
    MAX_TERMS,
    NORMS,
    check_operands,
    check_orders,
    need,
)
from .residual_norm_kernel import residual_norm_kernel
from .rows import merge_rows
from .targets import Specialization

MAX_LEADING = 3
"""Dimensions of rows, after those are merged that all operands step through evenly."""
ELEMENTS = 2048
"""That one program takes at least, by more than one row where rows are short."""


def residual_norm_reference(
    x: Tensor,
    cuts: Sequence[Tensor] | None = None,
    cut_scales: Sequence[Tensor | None] | None = None,
    gates: Sequence[Tensor | None] | None = None,
    factors: Sequence[float] | None = None,
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
    split: Sequence[int] | None = None,
    y_order: Sequence[int] | None = None,
    n_order: Sequence[int] | None = None,
) -> list[Tensor]:
    """The same by PyTorch's ops, in float32."""
    y = x.float()
    terms = _lists(cuts, cut_scales, gates, factors)
    for cut, cut_scale, gate, factor in zip(*terms, strict=True):
        term = cut.float() * factor
        for by in (cut_scale, gate):
            term = term if by is None else term * by.float()
        y = y + term
    n = _normalize(y, norm, weight_C, bias_C, eps)
    if scale is not None:
        n = n * (offset + scale.float())
    if shift is not None:
        n = n + shift.float()
    made = _allocate(
        x, y_dtype=y_dtype, n_dtype=n_dtype, y_like_x=y_like_x, n_like_x=n_like_x,
        split=split, y_order=y_order, n_order=n_order,
    )  # fmt: skip
    found = [(y, y_order)] * (y_dtype is not None) + [(n, n_order)] * (n_dtype is not None)
    return [
        out.copy_(each.reshape(*split).permute(*order) if split and order else each)
        for out, (each, order) in zip(made, found, strict=True)
    ]


def _lists(*lists: Sequence[Any] | None) -> list[list[Any]]:
    """Optional lists, empty where they are not there."""
    return [list(each or ()) for each in lists]


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


def residual_norm(
    x: Tensor,
    cuts: Sequence[Tensor] | None = None,
    cut_scales: Sequence[Tensor | None] | None = None,
    gates: Sequence[Tensor | None] | None = None,
    factors: Sequence[float] | None = None,
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
    split: Sequence[int] | None = None,
    y_order: Sequence[int] | None = None,
    n_order: Sequence[int] | None = None,
) -> list[Tensor]:
    """Residual adds and the norm after them, by the kernel.

    Args:
        x: (..., C) at any strides. All others are broadcast to its shape, at any strides.
        cuts, cut_scales, gates, factors: of the terms, up to :data:`MAX_TERMS`. A cut in
            float8_e4m3fn has a scale (..., 1), others have none.
        norm: one of :data:`NORMS`.
        y_dtype, n_dtype: of y and n, each of which is computed where it has a dtype.
        y_like_x, n_like_x: in memory as `torch.empty_like(x)` is; else contiguous.
        split: a shape, of x with dimensions of rows split, which orders are of.
        y_order, n_order: order of its dimensions, the last one last, in which y and n are returned,
            contiguous; by default, they have the shape of x.

    Returns:
        y, n, or both.

    Raises:
        ValueError: naming the argument, what was expected and what was found.
    """
    check_orders(x, split or (), y_order or (), n_order or ())
    for name, dtype in (("y_dtype", y_dtype), ("n_dtype", n_dtype)):
        need(name, f"one of {FLOATS}", dtype, dtype in (None, *FLOATS))
    outputs = _allocate(
        x, y_dtype=y_dtype, n_dtype=n_dtype, y_like_x=y_like_x, n_like_x=n_like_x,
        split=split, y_order=y_order, n_order=n_order,
    )  # fmt: skip
    need("y_dtype, n_dtype", "one of them", None, bool(outputs))
    y = None if y_dtype is None else _in_order(outputs[0], y_order or ())
    n = None if n_dtype is None else _in_order(outputs[-1], n_order or ())
    cuts, cut_scales, gates, factors = _lists(cuts, cut_scales, gates, factors)
    write_rows(
        x, cuts, cut_scales, gates, factors, norm, weight_C, bias_C, scale, shift,
        offset, eps, y=y, n=n, split=split or (),
    )  # fmt: skip
    return outputs


def write_rows(
    x: Tensor,
    cuts: Sequence[Tensor],
    cut_scales: Sequence[Tensor | None],
    gates: Sequence[Tensor | None],
    factors: Sequence[float],
    norm: str,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    offset: float,
    eps: float,
    *,
    y: Tensor | None,
    n: Tensor | None,
    split: Sequence[int] = (),
) -> None:
    """The same, to where y and n are: of the shape of x, or of `split`, at any strides."""
    check_operands(x, cuts, cut_scales, gates, factors, norm, weight_C, bias_C, scale, shift)
    if x.numel() == 0:
        return
    rest = [None] * (MAX_TERMS - len(cuts))
    operands = [x, *cuts, *rest, *cut_scales, *rest, *gates, *rest, scale, shift, y, n]
    sizes, strides = merge_rows(x.shape, operands, split)
    need("x", f"at most {MAX_LEADING} dimensions of rows", sizes, len(sizes) <= MAX_LEADING)
    missing = MAX_LEADING - len(sizes)
    _, J, K = [1] * missing + sizes
    num_rows, C = x.numel() // x.shape[-1], x.shape[-1]
    taken = configure(C)
    residual_norm_kernel[(triton.cdiv(num_rows, taken["ROWS"]),)](
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


def _allocate(
    x: Tensor,
    *_: object,
    y_dtype: torch.dtype | None = None,
    n_dtype: torch.dtype | None = None,
    y_like_x: bool = False,
    n_like_x: bool = False,
    split: Sequence[int] | None = None,
    y_order: Sequence[int] | None = None,
    n_order: Sequence[int] | None = None,
    **__: object,
) -> list[Tensor]:
    outputs = []
    wanted = ((y_dtype, y_like_x, y_order), (n_dtype, n_like_x, n_order))
    for dtype, is_like_x, order in wanted:
        if dtype is not None and split and order:
            outputs.append(x.new_empty([split[d] for d in order], dtype=dtype))
        elif dtype is not None:
            kept = torch.preserve_format if is_like_x else torch.contiguous_format
            outputs.append(torch.empty_like(x, dtype=dtype, memory_format=kept))
    return outputs


def _in_order(found: Tensor, order: Sequence[int]) -> Tensor:
    """A result with its dimensions as x has them, where it has them in another order."""
    return found.permute(*(order.index(d) for d in range(len(order)))) if order else found


SCHEMA = (
    "(Tensor x, Tensor[]? cuts=None, Tensor?[]? cut_scales=None, Tensor?[]? gates=None, "
    'float[]? factors=None, str norm="layer", Tensor? weight=None, Tensor? bias=None, '
    "Tensor? scale=None, Tensor? shift=None, float offset=1.0, float eps=1e-6, *, "
    "ScalarType? y_dtype=None, ScalarType? n_dtype=None, bool y_like_x=False, "
    "bool n_like_x=False, int[]? split=None, int[]? y_order=None, int[]? n_order=None"
    ") -> Tensor[]"
)
"""Lists are optional, not empty: compiled code cannot pass an empty one."""
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
    names = residual_norm_kernel.arg_names
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
        f"{dtype} C={C} {label}", residual_norm_kernel, signature, constants, num_warps,
        aligned=aligned,
    )  # fmt: skip
