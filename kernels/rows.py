"""Rows of tensors: all dimensions but the last, at any strides, as kernels count through them."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import narrow

Strides = tuple[int, ...]


def merge_rows(
    shape: Sequence[int], operands: Sequence[Tensor | None], split: Sequence[int] = ()
) -> tuple[list[int], list[Strides]]:
    """Sizes of the dimensions of rows; each operand's strides in these and in the last dimension.

    Operands are broadcast to `shape`, whose dimensions are then split as those of `split` are; or
    they are of this shape already. None has strides 0. Dimensions of size 1 are left out, and
    neighbors are one where every operand steps through both evenly.
    """
    zeros, split = (0,) * len(split or shape), tuple(split or shape)
    given = [
        zeros
        if x is None
        else x.stride()
        if x.shape == split
        else x.expand(*shape).view(split).stride()
        for x in operands
    ]
    sizes: list[int] = []
    steps: list[Strides] = []  # of each kept dimension, those of all operands
    for size, step in zip(split[:-1], list(zip(*given, strict=True))[:-1], strict=True):
        if size == 1:
            continue
        if sizes and all(a == b * size for a, b in zip(steps[-1], step, strict=True)):
            sizes[-1], steps[-1] = sizes[-1] * size, step
        else:
            sizes.append(size)
            steps.append(step)
    last = tuple(strides[-1] for strides in given)
    return sizes, list(zip(*steps, last, strict=True))


def is_split(split: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a shape is another one with dimensions of rows split."""
    *rest, last = split
    for size in shape[:-1]:
        found = 1
        while rest and found < size:
            found *= rest.pop(0)
        if found != size:
            return False
    return all(size == 1 for size in rest) and last == shape[-1]


@triton.jit
def decode_e4m3(bits):
    """float8_e4m3fn as float32: by a float16 that has the same bits, of a smaller exponent."""
    bits = bits.to(tl.uint16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    found = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), found)


@triton.jit
def load_rows(base, i, j, k, s_i, s_j, s_k, s_c, columns, valid):
    """Rows at (i, j, k) as they are."""
    at = (i * s_i + j * s_j + k * s_k)[:, None] + (columns * s_c)[None, :]
    return tl.load(base + at, mask=valid, other=0)


@triton.jit
def store_rows(base, found, i, j, k, s_i, s_j, s_k, s_c, columns, valid, EXACT: tl.constexpr):
    """float32 rows to (i, j, k), in the dtype that is there."""
    at = (i * s_i + j * s_j + k * s_k)[:, None] + (columns * s_c)[None, :]
    tl.store(base + at, narrow(found, base.dtype.element_ty, EXACT), mask=valid)
