"""What the attention kernels share: the definition, checks, layouts.

N  rows of the batch; H  heads; T  queries of a sequence; S  its keys; D  channels of a head
B, P  a batch of two dimensions in place of N: videos, and the positions of a frame
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import narrow, next_power_of_2
from .registration import check

MAX_HEAD_DIM = 128
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
LOG2_E = tl.constexpr(1.4426950408889634)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lengths_N: Tensor | None, scale: float
) -> Tensor:
    """softmax(q k^T scale + mask) v, as it is defined, in the dtype that comes in.

    Keys from `lengths_N[n]` on take no part; rows without any key are 0.
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


def allocate(q: Tensor, *_: object, **__: object) -> Tensor:
    """The result, not computed: (N, H, T, D), in memory as N, T, H, D, as the projection after it
    reads it; or (B, P, H, T, D), as B, T, P, H, D."""
    *places, H, T, D = q.shape
    laid_out = q.new_empty((*places[:1], T, *places[1:], H, D))
    return laid_out.movedim(1, -2)


def check_attention(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    num_dims: tuple[int, ...],
    rows_of_k: int | None = None,
) -> None:
    """Raises ValueError, naming the argument, what was expected and what was found.

    `rows_of_k`: of its batch, where they are not as many as those of q.
    """

    def need(argument: str, expected: str, found: object, is_right: bool) -> None:
        check(op, argument, expected, found, is_right)

    expected = {4: "4 dimensions (N, H, T, D)", 5: "5 dimensions (B, P, H, T, D)"}
    is_right = q.dim() in num_dims
    need("q", " or ".join(expected[n] for n in num_dims), tuple(q.shape), is_right)
    *lead, T, D = q.shape
    S = k.shape[-2] if k.dim() == q.dim() else -1
    lead_of_k = lead if rows_of_k is None else [rows_of_k, *lead[1:]]
    shape = f"({', '.join(map(str, lead_of_k))}, S, {D})"
    need("k", shape, tuple(k.shape), k.shape == (*lead_of_k, S, D))
    need("v", f"the shape of k, {tuple(k.shape)}", tuple(v.shape), v.shape == k.shape)
    for name, length in (("q", T), ("k", S)):
        need(name, "at least 1 token", length, length > 0)
    need("q", f"head dim up to {MAX_HEAD_DIM}", D, 1 <= D <= MAX_HEAD_DIM)
    for name, x in (("k", k), ("v", v)):
        is_same = x.dtype == q.dtype and x.device == q.device
        need(name, f"{q.dtype} on {q.device}", (x.dtype, x.device), is_same)
    if mask is not None:
        sizes = (*lead, T, S)
        is_right = mask.dim() == len(sizes) and all(
            m in (1, n) for m, n in zip(mask.shape, sizes, strict=True)
        )
        many = f"{len(sizes)} dimensions, broadcast to {sizes}"
        need("mask", many, tuple(mask.shape), is_right)


def check_lengths(op: str, q: Tensor, lengths_N: Tensor | None) -> None:
    """Raises ValueError where lengths are not one a row of the batch."""
    if lengths_N is not None:
        expected = f"({len(q)},) of int32 or int64 on {q.device}"
        found = (tuple(lengths_N.shape), lengths_N.dtype, lengths_N.device)
        is_right = lengths_N.shape == (len(q),) and lengths_N.device == q.device
        is_right = is_right and lengths_N.dtype in (torch.int32, torch.int64)
        check(op, "lengths", expected, found, is_right)


def strides_of(x: Tensor | None, num_dims: int) -> list[int]:
    """0 where there is but one element, which is read for all."""
    if x is None:
        return [0] * num_dims
    return [0 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True)]


def mask_kind(mask: Tensor | None) -> int:
    """None, of bools, to be added: as kernels tell them apart."""
    return 0 if mask is None else 1 if mask.dtype == torch.bool else 2


def type_of_mask(kind: int, dtype: str) -> str:
    """Of the argument, in a kernel's signature."""
    return "*i1" if kind == 1 else f"*{dtype}"


@triton.jit
def load_tile(base, rows, columns, stride, valid, D: tl.constexpr, BOUNDS: tl.constexpr):
    """Rows of a tile of channels; `BOUNDS`: whether rows may be missing. Channels may, too."""
    at = base + rows[:, None] + (columns * stride)[None, :]
    if BOUNDS:
        return tl.load(at, mask=valid[:, None] & (columns < D)[None, :], other=0.0)
    return tl.load(at, mask=(columns < D)[None, :], other=0.0)


@triton.jit
def store_tile(base, found, rows, columns, stride, valid, D: tl.constexpr, EXACT: tl.constexpr):
    """Rows of a tile of channels, in the dtype that is there."""
    at = base + rows[:, None] + (columns * stride)[None, :]
    inside = valid[:, None] & (columns < D)[None, :]
    tl.store(at, narrow(found, base.dtype.element_ty, EXACT), mask=inside)


@triton.jit
def add_mask(scores, mask, at, valid, MASK: tl.constexpr):
    """Scores in float32 with -inf where a key takes no part."""
    if MASK == 1:
        valid = valid & (tl.load(mask + at, mask=valid, other=0) != 0)
    if MASK == 2:
        scores += tl.load(mask + at, mask=valid, other=0.0).to(tl.float32)
    return tl.where(valid, scores, float("-inf"))


def split_in_two(count: int) -> tuple[int, int]:
    """Two tiles that hold so many channels or keys, of powers of two, at least 16: 72 is 64 + 16;
    or one, and 0, where two would not be smaller."""
    whole = max(next_power_of_2(count), 16)
    first = whole // 2
    second = max(next_power_of_2(count - first), 16) if first < count else 0
    return (first, second) if first >= 16 and first + second < whole else (whole, 0)
