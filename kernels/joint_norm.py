"""Norms of text and of latents into one tensor, one after the other.

    B  rows of the batch; C  channels; the parts differ in one dimension, here of 2 and 3 tokens

Each part is a residual norm of its own (:mod:`pabc.kernels.residual_norm`), with its own scales and
shifts. Each is written to its place in the joint tensor, which saves the copies of a concatenation.

    text (B, 2, C), latents (B, 3, C):  joint (B, 5, C), rows  t0 t1 l0 l1 l2
    text [[1, 3]], latents [[4, 0]], layer norm, shifts [0, 1] and none:  joint [[-1, 2], [1, -1]]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .registration import Constraint, KernelSignature
from .residual_norm import SIGNATURE as PART
from .residual_norm import ResidualNormArguments, residual_norm_reference, write_rows

PER_PART = ("counts", "weight", "bias", "scale", "shift", "offset", "writes_y")


class JointNormArguments(NamedTuple):
    """The arguments of :func:`joint_norm`.

    Attributes:
        x, weight, bias, scale, shift, offset: one for each part, as
            :class:`~pabc.kernels.residual_norm.ResidualNormArguments` has them.
        cuts, cut_scales, gates, factors: those of all parts, one part after the other.
        counts: the number of these of each part.
        norm, eps: of all parts.
        dim: the dimension in which the parts follow one another; not the last one.
        writes_y: for each part, whether to compute y, in the dtype of its x.
        dtype: of the joint n.
    """

    x: Sequence[Tensor]
    cuts: Sequence[Tensor] | None
    cut_scales: Sequence[Tensor | None] | None
    gates: Sequence[Tensor | None] | None
    factors: Sequence[float] | None
    counts: Sequence[int]
    norm: str
    weight: Sequence[Tensor | None]
    bias: Sequence[Tensor | None]
    scale: Sequence[Tensor | None]
    shift: Sequence[Tensor | None]
    offset: Sequence[float]
    eps: float
    dim: int
    writes_y: Sequence[bool]
    dtype: torch.dtype

    @property
    def parts(self) -> Iterator[ResidualNormArguments]:
        """The arguments of each part's residual norm."""
        start = 0
        for i, count in enumerate(self.counts):
            part = slice(start, start + count)
            start += count
            yield ResidualNormArguments(
                self.x[i],
                (self.cuts or ())[part],
                (self.cut_scales or ())[part],
                (self.gates or ())[part],
                (self.factors or ())[part],
                norm=self.norm,
                weight=self.weight[i],
                bias=self.bias[i],
                scale=self.scale[i],
                shift=self.shift[i],
                offset=self.offset[i],
                eps=self.eps,
                y_dtype=self.x[i].dtype if self.writes_y[i] else None,
                n_dtype=self.dtype,
            )

    def constraints(self) -> Iterator[Constraint]:
        """Yields the numbers of parts and of cuts, and the shapes of parts."""
        num_parts, num_cuts, dim = len(self.x), len(self.cuts or ()), self.dim
        yield "x", "at least 1 part", num_parts, num_parts > 0
        for name in PER_PART:
            num = len(getattr(self, name))
            yield name, f"one for each part, {num_parts}", num, num == num_parts
        counts = list(self.counts)
        yield "counts", f"{num_cuts} cuts in all", counts, sum(counts) == num_cuts
        shapes = [list(each.shape) for each in self.x]
        yield "dim", "a dimension of rows", dim, 0 <= dim < len(shapes[0]) - 1
        others = [shape[:dim] + shape[dim + 1 :] for shape in shapes]
        is_right = all(each == others[0] for each in others)
        yield "x", f"equal shapes but for dimension {dim}", shapes, is_right


SIGNATURE = KernelSignature("joint_norm", JointNormArguments)


@SIGNATURE.checked
def joint_norm_reference(given: JointNormArguments) -> list[Tensor]:
    """Computes the same with PyTorch's ops, in float32."""
    results = [residual_norm_reference(*part) for part in given.parts]
    sums = [y for *ys, _ in results for y in ys]
    return [*sums, torch.cat([n for *_, n in results], given.dim)]


@SIGNATURE.checked
def joint_norm(given: JointNormArguments) -> list[Tensor]:
    """Computes residual norms of several parts with the kernel, into one tensor.

    Returns:
        Each y that is asked for, and the joint n, all contiguous.

    Raises:
        ValueError: if an argument is not as :class:`JointNormArguments` states, or one of a part
            not as :class:`~pabc.kernels.residual_norm.ResidualNormArguments` states.
    """
    outputs = _allocate(given)
    sums = iter(outputs[:-1])
    places = outputs[-1].split([each.shape[given.dim] for each in given.x], given.dim)
    for part, place in zip(given.parts, places, strict=True):
        PART.check(part)
        write_rows(part, y=None if part.y_dtype is None else next(sums), n=place)
    return outputs


def _allocate(given: JointNormArguments) -> list[Tensor]:
    sums = [
        torch.empty_like(each, memory_format=torch.contiguous_format)
        for each, is_written in zip(given.x, given.writes_y, strict=True)
        if is_written
    ]
    shape = list(given.x[0].shape)
    shape[given.dim] = sum(each.shape[given.dim] for each in given.x)
    return [*sums, given.x[0].new_empty(shape, dtype=given.dtype)]


OP = SIGNATURE.register(launch=joint_norm, reference=joint_norm_reference, allocate=_allocate)
