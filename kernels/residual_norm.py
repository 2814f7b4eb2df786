"""Residual adds and the norm after them in one pass over memory: adaLN, and reads of the cache.

    R  rows: all dimensions but the last; C  channels, the last dimension

    y = x + sum of factor * gate * cut        up to 3 cuts, in the model's dtype or in fp8
    n = norm(y) * weight + bias               layer norm, RMS norm or none
    n = n * (offset + scale) + shift          modulation

One program holds whole rows. Each element of x and of the cuts is read once, at any strides, and
each element of y and n is written once. Everything between is float32; only y and n are rounded.
Gates, scales and shifts are broadcast, as (B, 1, C) is to (B, T, C).

    x = [1, 3], cut = [2, 4], gate = [0.5, 1]:  y = [2, 7];  layer norm: [-1, 1];
    scale = [1, 0], offset = 1, shift = [0, 5]:  n = [-2, 6]

Cuts in fp8 are float8_e4m3fn, decoded by integer arithmetic: not every GPU knows this dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, NamedTuple

import torch
import triton
from torch import Tensor

from .arithmetic import INTERPRETED
from .dtypes import FLOATS, FP8
from .registration import Constraint, KernelSignature, TensorSpec
from .residual_norm_kernel import residual_norm_kernel
from .rows import MAX_CHANNELS, MAX_ROW_DIMS, configure_rows, is_split, merge_rows, pad_rows

MAX_TERMS = 3
NORMS = ("none", "layer", "rms")
ROW = TensorSpec("(..., C)", dtypes=FLOATS, broadcast=True)
LEARNED = TensorSpec("(C,)", dtypes=FLOATS)


class Summand(NamedTuple):
    """One term of the sum: factor * gate * cut * cut_scale."""

    cut: Tensor
    cut_scale: Tensor | None
    gate: Tensor | None
    factor: float


class ResidualNormArguments(NamedTuple):
    """The arguments of :func:`residual_norm`.

    Lists are None rather than empty: compiled code can't pass an empty one.

    Attributes:
        x: the residual stream, at any strides. All others are broadcast to its shape.
        cuts, cut_scales, gates, factors: of the terms, one each, up to :data:`MAX_TERMS`. A cut in
            float8_e4m3fn has a scale (..., 1), others have None.
        norm: one of :data:`NORMS`.
        weight, bias: of the norm.
        scale, shift, offset: of the modulation.
        eps: of the norm.
        y_dtype, n_dtype: the dtypes of y and n; None: it is not computed.
        y_like_x, n_like_x: lays y or n out as `torch.empty_like(x)`, instead of contiguously.
        split: a shape: that of x with dimensions of rows split.
        y_order, n_order: returns y or n as a contiguous tensor with the dimensions of `split` in
            this order, the last one last; by default it has the shape of x.
    """

    x: Annotated[Tensor, TensorSpec("(..., C)", dtypes=FLOATS)]
    cuts: Annotated[
        Sequence[Tensor] | None, TensorSpec("(..., C)", dtypes=(*FLOATS, FP8), broadcast=True)
    ] = None
    cut_scales: Annotated[
        Sequence[Tensor | None] | None, TensorSpec("(..., 1)", dtypes=FLOATS, broadcast=True)
    ] = None
    gates: Annotated[Sequence[Tensor | None] | None, ROW] = None
    factors: Sequence[float] | None = None
    norm: str = "layer"
    weight: Annotated[Tensor | None, LEARNED] = None
    bias: Annotated[Tensor | None, LEARNED] = None
    scale: Annotated[Tensor | None, ROW] = None
    shift: Annotated[Tensor | None, ROW] = None
    offset: float = 1.0
    eps: float = 1e-6
    y_dtype: torch.dtype | None = None
    n_dtype: torch.dtype | None = None
    y_like_x: bool = False
    n_like_x: bool = False
    split: Sequence[int] | None = None
    y_order: Sequence[int] | None = None
    n_order: Sequence[int] | None = None

    @property
    def summands(self) -> list[Summand]:
        """The terms, one by one."""
        fields = (self.cuts, self.cut_scales, self.gates, self.factors)
        return [Summand(*each) for each in zip(*(field or () for field in fields), strict=True)]

    def constraints(self) -> Iterator[Constraint]:
        """Yields sizes, and which arguments go together."""
        C = self.x.shape[-1]
        yield "x", f"up to {MAX_CHANNELS} channels", C, C <= MAX_CHANNELS
        yield "norm", f"one of {NORMS}", self.norm, self.norm in NORMS
        yield from self._constrain_terms()
        yield from self._constrain_results()

    def _constrain_terms(self) -> Iterator[Constraint]:
        num_cuts = len(self.cuts or ())
        yield "cuts", f"at most {MAX_TERMS}", num_cuts, num_cuts <= MAX_TERMS
        for name in ("cut_scales", "gates", "factors"):
            num = len(getattr(self, name) or ())
            yield name, f"one for each cut, {num_cuts}", num, num == num_cuts
        for cut, cut_scale, *_ in self.summands:
            is_scaled = cut_scale is not None
            is_right = is_scaled == (cut.dtype == FP8)
            yield "cut_scales", "given for fp8, and only there", is_scaled, is_right

    def _constrain_results(self) -> Iterator[Constraint]:
        shape, split = tuple(self.x.shape), tuple(self.split or ())
        is_right = not split or is_split(split, shape)
        yield "split", f"{shape} with dimensions of rows split", split, is_right
        dims = list(range(len(split)))
        for name in ("y_order", "n_order"):
            order = list(getattr(self, name) or ())
            is_right = not order or (sorted(order) == dims and order[-1] == dims[-1])
            yield name, f"an order of {dims} that ends in the last", order, is_right
        for name in ("y_dtype", "n_dtype"):
            dtype = getattr(self, name)
            yield name, f"one of {FLOATS}", dtype, dtype in (None, *FLOATS)
        is_right = self.y_dtype is not None or self.n_dtype is not None
        yield "n_dtype", "a dtype where y_dtype is None", None, is_right


SIGNATURE = KernelSignature("residual_norm", ResidualNormArguments)


@SIGNATURE.checked
def residual_norm_reference(given: ResidualNormArguments) -> list[Tensor]:
    """Computes the same with PyTorch's ops, in float32."""
    y = given.x.float()
    for cut, cut_scale, gate, factor in given.summands:
        term = cut.float() * factor
        for by in (cut_scale, gate):
            term = term if by is None else term * by.float()
        y = y + term
    n = _normalize(y, given)
    if given.scale is not None:
        n = n * (given.offset + given.scale.float())
    if given.shift is not None:
        n = n + given.shift.float()
    exact = [(y, given.y_order)] * (given.y_dtype is not None)
    exact += [(n, given.n_order)] * (given.n_dtype is not None)
    split = given.split
    return [
        out.copy_(each.reshape(*split).permute(*order) if split and order else each)
        for out, (each, order) in zip(_allocate(given), exact, strict=True)
    ]


def _normalize(y: Tensor, given: ResidualNormArguments) -> Tensor:
    if given.norm == "layer":
        y = y - y.mean(-1, keepdim=True)
    if given.norm != "none":
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + given.eps)
    if given.weight is not None:
        y = y * given.weight.float()
    return y if given.bias is None else y + given.bias.float()


@SIGNATURE.checked
def residual_norm(given: ResidualNormArguments) -> list[Tensor]:
    """Computes residual adds and the norm after them with the kernel.

    Returns:
        y, n, or both: those that have a dtype.

    Raises:
        ValueError: if an argument is not as :class:`ResidualNormArguments` states, or if rows have
            more than :data:`~pabc.kernels.rows.MAX_ROW_DIMS` dimensions after merging.
    """
    outputs = _allocate(given)
    y = None if given.y_dtype is None else _in_order(outputs[0], given.y_order or ())
    n = None if given.n_dtype is None else _in_order(outputs[-1], given.n_order or ())
    write_rows(given, y=y, n=n)
    return outputs


def write_rows(given: ResidualNormArguments, *, y: Tensor | None, n: Tensor | None) -> None:
    """Computes y and n into given memory, of the shape of x or of `split`, at any strides."""
    x, summands = given.x, given.summands
    if x.numel() == 0:
        return
    rest = [None] * (MAX_TERMS - len(summands))
    cuts, cut_scales = [s.cut for s in summands], [s.cut_scale for s in summands]
    gates = [s.gate for s in summands]
    operands = [x, *cuts, *rest, *cut_scales, *rest, *gates, *rest, given.scale, given.shift, y, n]
    sizes, strides = merge_rows(x.shape, operands, given.split or ())
    if len(sizes) > MAX_ROW_DIMS:
        SIGNATURE.refuse("x", f"at most {MAX_ROW_DIMS} dimensions of rows", sizes)
    (_, J, K), steps = pad_rows(sizes, strides)
    num_rows, C = x.numel() // x.shape[-1], x.shape[-1]
    config = configure_rows(C)
    residual_norm_kernel[(triton.cdiv(num_rows, config["ROWS"]),)](
        *(x if operand is None else _as_bits(operand) for operand in operands),
        *(x if each is None else each.contiguous() for each in (given.weight, given.bias)),
        *steps, *(s.factor for s in summands), *(1.0 for _ in rest),
        given.offset, given.eps, num_rows, J, K,
        C=C, NORM=NORMS.index(given.norm), EXACT=INTERPRETED,
        **_find_forms(summands),
        WEIGHT=given.weight is not None, BIAS=given.bias is not None,
        SCALE=given.scale is not None, SHIFT=given.shift is not None,
        WRITE_Y=y is not None, WRITE_N=n is not None, **config,
    )  # fmt: skip


def _as_bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == FP8 else x


def _find_forms(summands: Sequence[Summand]) -> dict[str, int]:
    """Returns for each possible term its FORM (0: none, 1: a float, 2: fp8) and if it is GATED."""
    forms: dict[str, int] = dict.fromkeys((f"FORM{at}" for at in range(MAX_TERMS)), 0)
    forms |= dict.fromkeys((f"GATED{at}" for at in range(MAX_TERMS)), False)
    for at, summand in enumerate(summands):
        forms[f"FORM{at}"] = 2 if summand.cut.dtype == FP8 else 1
        forms[f"GATED{at}"] = summand.gate is not None
    return forms


def _allocate(given: ResidualNormArguments) -> list[Tensor]:
    x, split = given.x, given.split
    outputs = []
    for dtype, is_like_x, order in (
        (given.y_dtype, given.y_like_x, given.y_order),
        (given.n_dtype, given.n_like_x, given.n_order),
    ):
        if dtype is not None and split and order:
            outputs.append(x.new_empty([split[d] for d in order], dtype=dtype))
        elif dtype is not None:
            kept = torch.preserve_format if is_like_x else torch.contiguous_format
            outputs.append(torch.empty_like(x, dtype=dtype, memory_format=kept))
    return outputs


def _in_order(out: Tensor, order: Sequence[int]) -> Tensor:
    """Returns a view of `out`, whose dimensions are in this order, with them in order again."""
    return out.permute(*(order.index(d) for d in range(len(order)))) if order else out


OP = SIGNATURE.register(launch=residual_norm, reference=residual_norm_reference, allocate=_allocate)
