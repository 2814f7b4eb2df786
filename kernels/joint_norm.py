"""Norms of text and of latents whose results lie in one tensor, one after the other.

Each part is a residual norm of its own, see :mod:`pabc.kernels.residual_norm`: of other rows, with
other scales and shifts. What comes after takes both together; each is written to its place, so that
nothing is copied to put one beside the other.

    text (B, 2, C), latents (B, 3, C):  joint (B, 5, C), rows  t0 t1 l0 l1 l2
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .registration import check, register
from .residual_norm import residual_norm_reference, write_rows

Parts = Iterator[tuple[Any, ...]]


def joint_norm_reference(
    x: Sequence[Tensor],
    cuts: Sequence[Tensor] | None,
    cut_scales: Sequence[Tensor | None] | None,
    gates: Sequence[Tensor | None] | None,
    factors: Sequence[float] | None,
    counts: Sequence[int],
    norm: str,
    weight_C: Sequence[Tensor | None],
    bias_C: Sequence[Tensor | None],
    scale: Sequence[Tensor | None],
    shift: Sequence[Tensor | None],
    offset: Sequence[float],
    eps: float,
    *,
    dim: int,
    writes_y: Sequence[bool],
    dtype: torch.dtype,
) -> list[Tensor]:
    """The same by PyTorch's ops, in float32."""
    sums, normed = [], []
    parts = _parts(x, cuts, cut_scales, gates, factors, counts, norm,
                   weight_C, bias_C, scale, shift, offset, eps)  # fmt: skip
    for part, is_written in zip(parts, writes_y, strict=True):
        y_dtype = part[0].dtype if is_written else None
        *y, n = residual_norm_reference(*part, y_dtype=y_dtype, n_dtype=dtype)
        sums += y
        normed.append(n)
    return [*sums, torch.cat(normed, dim)]


def _parts(
    x: Sequence[Tensor],
    cuts: Sequence[Tensor] | None,
    cut_scales: Sequence[Tensor | None] | None,
    gates: Sequence[Tensor | None] | None,
    factors: Sequence[float] | None,
    counts: Sequence[int],
    norm: str,
    *after: Any,
) -> Parts:
    """The arguments of each part's residual norm; `after` ends in the epsilon of all."""
    *each, eps = after
    start = 0
    for i, count in enumerate(counts):
        terms = ((each or ())[start : start + count] for each in (cuts, cut_scales, gates, factors))
        yield (x[i], *terms, norm, *(item[i] for item in each), eps)
        start += count


def joint_norm(
    x: Sequence[Tensor],
    cuts: Sequence[Tensor] | None,
    cut_scales: Sequence[Tensor | None] | None,
    gates: Sequence[Tensor | None] | None,
    factors: Sequence[float] | None,
    counts: Sequence[int],
    norm: str,
    weight_C: Sequence[Tensor | None],
    bias_C: Sequence[Tensor | None],
    scale: Sequence[Tensor | None],
    shift: Sequence[Tensor | None],
    offset: Sequence[float],
    eps: float,
    *,
    dim: int,
    writes_y: Sequence[bool],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Residual norms of several parts, by the kernel, into one tensor.

    Args:
        x, weight_C, bias_C, scale, shift, offset: one for each part, as `residual_norm` takes them.
        cuts, cut_scales, gates, factors: those of all parts, one part after the other.
        counts: how many of these are each part's.
        dim: in which the parts lie one after the other; not the last one.
        writes_y: for each part, whether y is wanted, in the dtype of its x.
        dtype: of the result.

    Returns:
        each y that is wanted, and the joint n, all contiguous.

    Raises:
        ValueError: naming the argument, what was expected and what was found.
    """
    _check(x, counts, (weight_C, bias_C, scale, shift, offset, writes_y), dim, len(cuts or ()))
    outputs = _allocate(x, dim=dim, writes_y=writes_y, dtype=dtype)
    sums = iter(outputs[:-1])
    places = outputs[-1].split([each.shape[dim] for each in x], dim)
    parts = _parts(x, cuts, cut_scales, gates, factors, counts, norm,
                   weight_C, bias_C, scale, shift, offset, eps)  # fmt: skip
    for part, is_written, place in zip(parts, writes_y, places, strict=True):
        write_rows(*part, y=next(sums) if is_written else None, n=place)
    return outputs


def _check(
    x: Sequence[Tensor],
    counts: Sequence[int],
    others: Sequence[Sequence[Any]],
    dim: int,
    num_cuts: int,
) -> None:
    def need(argument: str, expected: str, found: object, is_right: bool) -> None:
        check("joint_norm", argument, expected, found, is_right)

    need("x", "a part or more", len(x), len(x) > 0)
    need("counts", f"one for each part, {num_cuts} in all", list(counts),
         len(counts) == len(x) and sum(counts) == num_cuts)  # fmt: skip
    lengths = [len(item) for item in others]
    need("weight, bias, scale, shift, offset, writes_y", f"{len(x)} of each", lengths,
         set(lengths) == {len(x)})  # fmt: skip
    need("dim", "one of rows", dim, 0 <= dim < x[0].dim() - 1)
    shapes = [list(each.shape) for each in x]
    fits = all(s[:dim] + s[dim + 1 :] == shapes[0][:dim] + shapes[0][dim + 1 :] for s in shapes)
    need("x", f"equal but for dimension {dim}", shapes, fits)


def _allocate(
    x: Sequence[Tensor], *_: object, dim: int, writes_y: Sequence[bool], dtype: torch.dtype
) -> list[Tensor]:
    made = [
        torch.empty_like(each, memory_format=torch.contiguous_format)
        for each, is_written in zip(x, writes_y, strict=True)
        if is_written
    ]
    shape = list(x[0].shape)
    shape[dim] = sum(each.shape[dim] for each in x)
    return [*made, x[0].new_empty(shape, dtype=dtype)]


SCHEMA = (
    "(Tensor[] x, Tensor[]? cuts, Tensor?[]? cut_scales, Tensor?[]? gates, "
    "float[]? factors, int[] counts, str norm, Tensor?[] weight, Tensor?[] bias, Tensor?[] scale, "
    "Tensor?[] shift, float[] offset, float eps, *, int dim, bool[] writes_y, ScalarType dtype"
    ") -> Tensor[]"
)
OP = register(
    "joint_norm", SCHEMA, launch=joint_norm, reference=joint_norm_reference, allocate=_allocate
)
