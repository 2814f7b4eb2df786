"""Shared parts of the attention kernels: the definition, constraints, layouts, tiles.

N  rows of the batch; H  heads; T  queries of a sequence; S  its keys; D  channels of a head
B, P  a batch of two dimensions in place of N: videos, and the positions of a frame
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import narrow, next_power_of_2
from .registration import Constraint, TensorSpec

MAX_HEAD_DIM = 128
LENGTHS = TensorSpec("(N,)", dtypes=(torch.int32, torch.int64))
"""The number of keys of each row of the batch that take part."""
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
LOG2_E = tl.constexpr(1.4426950408889634)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lengths_N: Tensor | None, scale: float
) -> Tensor:
    """Returns softmax(q k^T scale + mask) v by its definition, in the dtype of its arguments.

    Row n of the batch attends to its first `lengths_N[n]` keys; queries without any key give 0.
    """
    scores = q @ k.mT * scale
    if mask is not None:
        is_bool = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, float("-inf")) if is_bool else scores + mask
    if lengths_N is not None:
        takes_part = torch.arange(k.shape[-2], device=k.device) < lengths_N[:, None]
        scores = scores.masked_fill(~takes_part[:, None, None], float("-inf"))
    top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    return (weights / torch.where(total == 0, 1.0, total)) @ v


def allocate(q: Tensor) -> Tensor:
    """Returns memory for the result, laid out as the projection after it reads it.

    (N, H, T, D) is laid out as (N, T, H, D), and (B, P, H, T, D) as (B, T, P, H, D).
    """
    *places, H, T, D = q.shape
    laid_out = q.new_empty((*places[:1], T, *places[1:], H, D))
    return laid_out.movedim(1, -2)


def constrain_attention(q: Tensor, k: Tensor, mask: Tensor | None) -> Iterator[Constraint]:
    """Yields the sizes that all attention kernels need."""
    *_, T, D = q.shape
    S = k.shape[-2]
    yield "q", "at least 1 token", T, T > 0
    yield "k", "at least 1 token", S, S > 0
    yield "q", f"a head dim of 1 to {MAX_HEAD_DIM}", D, 1 <= D <= MAX_HEAD_DIM
    if mask is not None:
        yield "mask", f"{q.dim()} dimensions", mask.dim(), mask.dim() == q.dim()


def strides_of(x: Tensor | None, num_dims: int) -> list[int]:
    """Returns strides, 0 in dimensions of size 1, whose one element is read for all."""
    if x is None:
        return [0] * num_dims
    return [0 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True)]


def mask_kind(mask: Tensor | None) -> int:
    """Returns the MASK of a kernel: 0 without a mask, 1 for bools, 2 for numbers to add."""
    return 0 if mask is None else 1 if mask.dtype == torch.bool else 2


@triton.jit
def load_tile(base, rows, columns, stride, valid, D: tl.constexpr, BOUNDS: tl.constexpr):
    """Returns a tile, 0 in channels from D on and, with `BOUNDS`, in invalid rows."""
    at = base + rows[:, None] + (columns * stride)[None, :]
    if BOUNDS:
        return tl.load(at, mask=valid[:, None] & (columns < D)[None, :], other=0.0)
    return tl.load(at, mask=(columns < D)[None, :], other=0.0)


@triton.jit
def store_tile(base, tile, rows, columns, stride, valid, D: tl.constexpr, EXACT: tl.constexpr):
    """Stores a float32 tile of rows and channels in the dtype of `base`."""
    at = base + rows[:, None] + (columns * stride)[None, :]
    inside = valid[:, None] & (columns < D)[None, :]
    tl.store(at, narrow(tile, base.dtype.element_ty, EXACT), mask=inside)


@triton.jit
def add_mask(scores, mask, at, valid, MASK: tl.constexpr):
    """Returns float32 scores with the mask applied: -inf where a key takes no part."""
    if MASK == 1:
        valid = valid & (tl.load(mask + at, mask=valid, other=0) != 0)
    if MASK == 2:
        scores += tl.load(mask + at, mask=valid, other=0.0).to(tl.float32)
    return tl.where(valid, scores, float("-inf"))


def split_in_two(count: int) -> tuple[int, int]:
    """Returns the widths of two tiles for `count` channels or keys: 72 is 64 + 16.

    Widths are powers of two of at least 16. The second is 0 where one tile is as small.
    """
    whole = max(next_power_of_2(count), 16)
    first = whole // 2
    second = max(next_power_of_2(count - first), 16) if first < count else 0
    return (first, second) if first >= 16 and first + second < whole else (whole, 0)
