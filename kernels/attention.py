"""Attention of any length: spatial, full and joint attention of video and image models.

    N  rows of the batch; H  heads; T  queries of a sequence; S  its keys; D  channels of a head

One program takes a block of queries of one head and goes through the keys block by block, with a
running maximum and a running sum of each query's weights (online softmax, Milakov and Gimelshein
2018), so that scores are never stored in memory. A number of channels that is not a power of two
is two tiles, say 64 + 16 for 72, so that neither loads nor products are padded to 128. Only the
last block of keys needs bounds checks.

    scores of a query, two blocks of two keys: [1, 2] then [4, 0]
        after the first:   maximum 2, sum e^-1 + 1, values weighted by these
        at the second:     all of it times e^(2 - 4)
        after the second:  maximum 4, sum (e^-1 + 1) e^-2 + 1 + e^-4, as of [1, 2, 4, 0] at once
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import INTERPRETED, dot, narrow, next_power_of_2
from .attention_parts import (
    LENGTHS,
    LOG2_E,
    LOWEST,
    add_mask,
    allocate,
    attend,
    constrain_attention,
    load_tile,
    mask_kind,
    split_in_two,
    store_tile,
    strides_of,
)
from .registration import Constraint, KernelSignature, TensorSpec


class AttentionArguments(NamedTuple):
    """The arguments of :func:`attention`.

    Attributes:
        q, k, v: queries, keys and values at any strides.
        mask: bools (True takes part) or numbers to add to scores, broadcast to (N, H, T, S).
        lengths: the number of keys of each row of the batch that take part, the first ones; by
            default all.
        scale: a factor of scores; by default D ** -0.5.
    """

    q: Annotated[Tensor, TensorSpec("(N, H, T, D)")]
    k: Annotated[Tensor, TensorSpec("(N, H, S, D)", dtypes="q")]
    v: Annotated[Tensor, TensorSpec("(N, H, S, D)", dtypes="q")]
    mask: Annotated[Tensor | None, TensorSpec("(N, H, T, S)", broadcast=True)] = None
    lengths: Annotated[Tensor | None, LENGTHS] = None
    scale: float | None = None

    def constraints(self) -> Iterator[Constraint]:
        """Yields the sizes."""
        return constrain_attention(self.q, self.k, self.mask)


SIGNATURE = KernelSignature("attention", AttentionArguments)


@SIGNATURE.checked
def attention_reference(given: AttentionArguments) -> Tensor:
    """Computes the same with PyTorch's ops, in float32."""
    q, k, v = (x.float() for x in (given.q, given.k, given.v))
    scale = q.shape[-1] ** -0.5 if given.scale is None else given.scale
    result = attend(q, k, v, given.mask, given.lengths, scale).to(given.q.dtype)
    return allocate(result).copy_(result)


@triton.jit
def _attend_block(
    q_a, q_b, acc_a, acc_b, top, total,
    k, v, mask, rows_m, m_s, valid_t, start, length, k_s, k_d, v_s, v_d, scale,
    D: tl.constexpr, COLUMNS_A: tl.constexpr, COLUMNS_B: tl.constexpr, BLOCK_S: tl.constexpr,
    MASK: tl.constexpr, BOUNDS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Adds the block of keys from `start` on to the running sums.

    Scores are in units of log 2, since GPUs have an instruction for 2 ** x.
    """
    s = start + tl.arange(0, BLOCK_S)
    valid_s = s < length
    at = s.to(tl.int64)
    columns_a = tl.arange(0, COLUMNS_A)
    k_a = load_tile(k, at * k_s, columns_a, k_d, valid_s, D, BOUNDS)
    scores = dot(q_a, tl.trans(k_a), EXACT)
    if COLUMNS_B:
        columns_b = COLUMNS_A + tl.arange(0, COLUMNS_B)
        k_b = load_tile(k, at * k_s, columns_b, k_d, valid_s, D, BOUNDS)
        scores += dot(q_b, tl.trans(k_b), EXACT)
    if MASK == 2:
        valid = valid_t[:, None] & valid_s[None, :]
        scores = add_mask(scores * scale, mask, rows_m[:, None] + (at * m_s)[None, :], valid, MASK)
        scores = tl.where(scores == float("-inf"), scores, tl.maximum(scores * LOG2_E, LOWEST))
    else:
        scores *= scale * LOG2_E
        if MASK == 1:
            valid = valid_t[:, None] & valid_s[None, :]
            scores = add_mask(scores, mask, rows_m[:, None] + (at * m_s)[None, :], valid, MASK)
        elif BOUNDS:
            scores = tl.where(valid_s[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    weights = narrow(weights, v.dtype.element_ty, EXACT)
    v_a = load_tile(v, at * v_s, columns_a, v_d, valid_s, D, BOUNDS)
    acc_a = acc_a * shrink[:, None] + dot(weights, v_a, EXACT)
    if COLUMNS_B:
        columns_b = COLUMNS_A + tl.arange(0, COLUMNS_B)
        v_b = load_tile(v, at * v_s, columns_b, v_d, valid_s, D, BOUNDS)
        acc_b = acc_b * shrink[:, None] + dot(weights, v_b, EXACT)
    return acc_a, acc_b, new_top, total


@triton.jit
def attention_kernel(
    q, k, v, out, mask, lengths,
    q_n, q_h, q_t, q_d, k_n, k_h, k_s, k_d, v_n, v_h, v_s, v_d, o_n, o_h, o_t, o_d,
    m_n, m_h, m_t, m_s,
    H, T, S, scale,
    D: tl.constexpr, COLUMNS_A: tl.constexpr, COLUMNS_B: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    MASK: tl.constexpr, LENGTHS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Computes a block of queries of one head."""
    sequence = tl.program_id(1)
    n, h = (sequence // H).to(tl.int64), (sequence % H).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    valid_t = t < T
    at = t.to(tl.int64)
    q += n * q_n + h * q_h
    k += n * k_n + h * k_h
    v += n * v_n + h * v_h
    out += n * o_n + h * o_h
    rows_m = n * m_n + h * m_h + at * m_t
    length = S
    if LENGTHS:
        length = tl.minimum(tl.load(lengths + n).to(tl.int32), S)

    columns_a = tl.arange(0, COLUMNS_A)
    q_a = load_tile(q, at * q_t, columns_a, q_d, valid_t, D, True)
    acc_a = tl.zeros([BLOCK_T, COLUMNS_A], tl.float32)
    q_b, acc_b = q_a, acc_a
    if COLUMNS_B:
        columns_b = COLUMNS_A + tl.arange(0, COLUMNS_B)
        q_b = load_tile(q, at * q_t, columns_b, q_d, valid_t, D, True)
        acc_b = tl.zeros([BLOCK_T, COLUMNS_B], tl.float32)
    top = tl.full([BLOCK_T], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    whole = length // BLOCK_S * BLOCK_S
    for start in tl.range(0, whole, BLOCK_S):
        acc_a, acc_b, top, total = _attend_block(
            q_a, q_b, acc_a, acc_b, top, total,
            k, v, mask, rows_m, m_s, valid_t, start, length, k_s, k_d, v_s, v_d, scale,
            D, COLUMNS_A, COLUMNS_B, BLOCK_S, MASK, False, EXACT,
        )  # fmt: skip
    if whole < length:
        acc_a, acc_b, top, total = _attend_block(
            q_a, q_b, acc_a, acc_b, top, total,
            k, v, mask, rows_m, m_s, valid_t, whole, length, k_s, k_d, v_s, v_d, scale,
            D, COLUMNS_A, COLUMNS_B, BLOCK_S, MASK, True, EXACT,
        )  # fmt: skip
    total = tl.where(total == 0, 1.0, total)[:, None]
    store_tile(out, acc_a / total, at * o_t, columns_a, o_d, valid_t, D, EXACT)
    if COLUMNS_B:
        columns_b = COLUMNS_A + tl.arange(0, COLUMNS_B)
        store_tile(out, acc_b / total, at * o_t, columns_b, o_d, valid_t, D, EXACT)


@SIGNATURE.checked
def attention(given: AttentionArguments) -> Tensor:
    """Computes attention with the kernel.

    Returns:
        (N, H, T, D), laid out in memory as (N, T, H, D). Queries without any key give 0.

    Raises:
        ValueError: if an argument is not as :class:`AttentionArguments` states.
    """
    q, k, v, mask, lengths, scale = given
    N, H, T, D = q.shape
    S = k.shape[2]
    out = allocate(q)
    config = configure(T, S, D, q.element_size(), mask_kind(mask))
    strides = [strides_of(x, 4) for x in (q, k, v, out, mask)]
    attention_kernel[(triton.cdiv(T, config["BLOCK_T"]), N * H)](
        q, k, v, out,
        q if mask is None else mask,  # q stands in for what is not given, and is not read
        q if lengths is None else lengths.contiguous(),
        *(stride for each in strides for stride in each),
        H, T, S, D**-0.5 if scale is None else scale,
        D=D, MASK=mask_kind(mask), LENGTHS=lengths is not None, EXACT=INTERPRETED, **config,
    )  # fmt: skip
    return out


def configure(T: int, S: int, D: int, itemsize: int, mask: int) -> dict[str, int]:
    """Returns blocks of queries and keys, tiles of channels, warps and stages.

    Blocks are 128 queries and 64 keys where registers and shared memory of every target suffice.
    With a mask, which is read beside the scores, half the queries; above 96 channels half the keys,
    and two tiles of channels with a mask. In float32, which has no tensor cores here, fewer of all.
    """
    first, second = split_in_two(D)
    block_t, block_s = (64 if mask else 128), (32 if D > 96 else 64)
    if mask and D > 96:
        first, second = first // 2, first // 2
    if itemsize == 4:
        block_t, block_s = 16, 32
    return {
        "COLUMNS_A": first,
        "COLUMNS_B": second,
        "BLOCK_T": min(block_t, max(next_power_of_2(T), 16)),
        "BLOCK_S": min(block_s, max(next_power_of_2(S), 16)),
        "num_warps": 8 if D > 64 or mask or itemsize == 4 else 4,
        "num_stages": 2,
    }


OP = SIGNATURE.register(
    launch=attention, reference=attention_reference, allocate=lambda given: allocate(given.q)
)
