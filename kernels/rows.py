"""Rows of tensors: how kernels step through all dimensions but the last, at any strides.

x (2, 3, 5, C) contiguous, gate (2, 1, 1, C), both broadcast to (2, 3, 5, C):
3 * 5 rows that share a row of the gate are one dimension
    sizes of rows (2, 15)       strides of x (15 C, C, 1), of the gate (C, 0, 1)
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import narrow, next_power_of_2

MAX_CHANNELS = 16384
"""Channels of a row that one program holds."""
MAX_ROW_DIMS = 3
"""Dimensions of rows that a kernel steps through, after merging."""
ELEMENTS = 2048
"""Elements that one program takes at least, in several rows where rows are short."""
RowStrides = tuple[int, ...]


def merge_rows(
    shape: Sequence[int], operands: Sequence[Tensor | None], split: Sequence[int] = ()
) -> tuple[list[int], list[RowStrides]]:
    """Merges neighboring dimensions of rows that every operand steps through evenly.

    Args:
        shape: to which operands are broadcast; the last dimension holds the channels of a row.
        operands: tensors of this shape, or of `split`; None has strides 0.
        split: `shape` with dimensions of rows split, which are then merged instead.

    Returns:
        The sizes of the dimensions that are left, without those of size 1 and without channels;
        and each operand's strides in these and, last, in the channels.
    """
    split = tuple(split or shape)
    strides = [_strides_in(x, shape, split) for x in operands]
    sizes: list[int] = []
    steps: list[RowStrides] = []  # of each kept dimension, those of all operands
    for size, step in zip(split[:-1], list(zip(*strides, strict=True))[:-1], strict=True):
        if size == 1:
            continue
        if sizes and all(a == b * size for a, b in zip(steps[-1], step, strict=True)):
            sizes[-1], steps[-1] = sizes[-1] * size, step
        else:
            sizes.append(size)
            steps.append(step)
    last = tuple(each[-1] for each in strides)
    return sizes, list(zip(*steps, last, strict=True))


def _strides_in(x: Tensor | None, shape: Sequence[int], split: tuple[int, ...]) -> RowStrides:
    if x is None:
        return (0,) * len(split)
    return x.stride() if x.shape == split else x.expand(*shape).view(split).stride()


def pad_rows(sizes: list[int], strides: list[RowStrides]) -> tuple[list[int], list[int]]:
    """Returns :data:`MAX_ROW_DIMS` sizes of rows, and all strides in these and in channels.

    `sizes` and `strides` come from :func:`merge_rows`; dimensions of size 1 are put before them.
    """
    missing = MAX_ROW_DIMS - len(sizes)
    return [1] * missing + sizes, [n for each in strides for n in (0,) * missing + each]


def is_split(split: Sequence[int], shape: Sequence[int]) -> bool:
    """Returns True if `split` is `shape` with dimensions of rows split."""
    *rest, last = split
    for size in shape[:-1]:
        found = 1
        while rest and found < size:
            found *= rest.pop(0)
        if found != size:
            return False
    return all(size == 1 for size in rest) and last == shape[-1]


def configure_rows(C: int) -> dict[str, int]:
    """Returns rows, padded channels and warps of one program: 16 elements a thread."""
    columns = max(next_power_of_2(C), 16)
    rows = max(ELEMENTS // columns, 1)
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": min(rows * columns // 512, 16)}


@triton.jit
def decode_e4m3(bits):
    """Returns the bits of float8_e4m3fn values as float32.

    The bits, shifted, are those of a float16 256 times smaller: not every GPU knows float8.
    """
    bits = bits.to(tl.uint16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    decoded = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), decoded)


@triton.jit
def load_rows(base, i, j, k, s_i, s_j, s_k, s_c, columns, valid):
    """Returns rows at places (i, j, k), in the dtype of `base`."""
    at = (i * s_i + j * s_j + k * s_k)[:, None] + (columns * s_c)[None, :]
    return tl.load(base + at, mask=valid, other=0)


@triton.jit
def store_rows(base, x, i, j, k, s_i, s_j, s_k, s_c, columns, valid, EXACT: tl.constexpr):
    """Stores float32 rows at places (i, j, k), in the dtype of `base`."""
    at = (i * s_i + j * s_j + k * s_k)[:, None] + (columns * s_c)[None, :]
    tl.store(base + at, narrow(x, base.dtype.element_ty, EXACT), mask=valid)
