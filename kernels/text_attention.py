"""Cross attention to short text, whose keys and values stay on chip.

    N  rows of the batch; H  heads; T  queries of a sequence; S  keys of a text
    M  texts; R  rows of the batch that share a text (the frames of a video): N = M * R
    D  channels of a head

One program loads all keys and values of one text and head once, and goes through blocks of queries
of all frames that share the text. It holds all scores of a query, so its softmax needs no running
maximum.

    R = 2, T = 3, blocks of two queries, three blocks a program:
        program 0: frame 0 queries 0 1, frame 0 query 2, frame 1 queries 0 1;  program 1: the rest
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
from .gpus import Target, target_of
from .registration import Constraint, KernelSignature, TensorSpec

MAX_KEYS = 512
MOST_QUERIES = 32
"""Queries of a block at most."""


class TextAttentionArguments(NamedTuple):
    """The arguments of :func:`text_attention`.

    Attributes:
        q, k, v: queries, keys and values at any strides; row n of the batch attends to text
            n // (N / M). S and D are limited by :func:`fits`.
        mask: bools (True takes part) or numbers to add to scores, broadcast to (N, H, T, S).
        lengths: the number of keys of each row of the batch that take part, the first ones; by
            default all.
        scale: a factor of scores; by default D ** -0.5.
    """

    q: Annotated[Tensor, TensorSpec("(N, H, T, D)")]
    k: Annotated[Tensor, TensorSpec("(M, H, S, D)", dtypes="q")]
    v: Annotated[Tensor, TensorSpec("(M, H, S, D)", dtypes="q")]
    mask: Annotated[Tensor | None, TensorSpec("(N, H, T, S)", broadcast=True)] = None
    lengths: Annotated[Tensor | None, LENGTHS] = None
    scale: float | None = None

    def constraints(self) -> Iterator[Constraint]:
        """Yields the sizes, and the bytes that must stay on the chip."""
        N, (M, _, S, D) = len(self.q), self.k.shape
        yield "k", f"a number of texts that divides {N}", M, M > 0 and N % M == 0
        yield from constrain_attention(self.q, self.k, self.mask)
        expected = f"at most {MAX_KEYS} keys, and as many bytes as stay on the chip"
        is_right = fits(S, D, self.k.element_size(), target_of(self.q.device))
        yield "k", expected, f"{S} keys of {D} channels, {self.k.dtype}", is_right


SIGNATURE = KernelSignature("text_attention", TextAttentionArguments)


@SIGNATURE.checked
def text_attention_reference(given: TextAttentionArguments) -> Tensor:
    """Computes the same with PyTorch's ops, in float32."""
    repeats = len(given.q) // len(given.k)
    q, k, v = (x.float() for x in (given.q, given.k, given.v))
    k, v = (x.repeat_interleave(repeats, 0) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if given.scale is None else given.scale
    result = attend(q, k, v, given.mask, given.lengths, scale).to(given.q.dtype)
    return allocate(result).copy_(result)


@triton.jit
def _find_scores(
    x_q, x_k, mask, rows_m, s, m_s, valid_t, length, scale,
    MASK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    valid = valid_t[:, None] & (s < length)[None, :]
    at = rows_m[:, None] + (s.to(tl.int64) * m_s)[None, :]
    return add_mask(dot(x_q, tl.trans(x_k), EXACT) * scale, mask, at, valid, MASK)


@triton.jit
def text_attention_kernel(
    q, k, v, out, mask, lengths,
    q_n, q_h, q_t, q_d, k_m, k_h, k_s, k_d, v_m, v_h, v_s, v_d, o_n, o_h, o_t, o_d,
    m_n, m_h, m_t, m_s,
    H, T, S, repeats, scale,
    D: tl.constexpr, COLUMNS: tl.constexpr, KEYS_A: tl.constexpr, KEYS_B: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCKS: tl.constexpr,
    MASK: tl.constexpr, LENGTHS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Computes BLOCKS blocks of queries of one text and head."""
    pair = tl.program_id(1)
    m, h = (pair // H).to(tl.int64), (pair % H).to(tl.int64)
    k += m * k_m + h * k_h
    v += m * v_m + h * v_h
    columns = tl.arange(0, COLUMNS)
    s_a, s_b = tl.arange(0, KEYS_A), tl.arange(0, KEYS_A)
    k_a = load_tile(k, s_a.to(tl.int64) * k_s, columns, k_d, s_a < S, D, True)
    v_a = load_tile(v, s_a.to(tl.int64) * v_s, columns, v_d, s_a < S, D, True)
    k_b, v_b = k_a, v_a
    if KEYS_B:
        s_b = KEYS_A + tl.arange(0, KEYS_B)
        k_b = load_tile(k, s_b.to(tl.int64) * k_s, columns, k_d, s_b < S, D, True)
        v_b = load_tile(v, s_b.to(tl.int64) * v_s, columns, v_d, s_b < S, D, True)

    blocks_a_row = tl.cdiv(T, BLOCK_T)
    first = tl.program_id(0) * BLOCKS
    for block in tl.range(first, tl.minimum(first + BLOCKS, repeats * blocks_a_row)):
        n = m * repeats + block // blocks_a_row
        t = (block % blocks_a_row) * BLOCK_T + tl.arange(0, BLOCK_T)
        valid_t = t < T
        at_t = t.to(tl.int64)
        rows_q = n * q_n + h * q_h + at_t * q_t
        x_q = load_tile(q, rows_q, columns, q_d, valid_t, D, True)
        length = S
        if LENGTHS:
            length = tl.minimum(tl.load(lengths + n).to(tl.int32), S)
        rows_m = n * m_n + h * m_h + at_t * m_t
        scores_a = _find_scores(
            x_q, k_a, mask, rows_m, s_a, m_s, valid_t, length, scale, MASK, EXACT
        )
        top = tl.maximum(tl.max(scores_a, 1), LOWEST)
        scores_b = scores_a
        if KEYS_B:
            scores_b = _find_scores(
                x_q, k_b, mask, rows_m, s_b, m_s, valid_t, length, scale, MASK, EXACT
            )
            top = tl.maximum(top, tl.max(scores_b, 1))
        weights = tl.exp(scores_a - top[:, None])
        total = tl.sum(weights, 1)
        result = dot(narrow(weights, v.dtype.element_ty, EXACT), v_a, EXACT)
        if KEYS_B:
            weights = tl.exp(scores_b - top[:, None])
            total += tl.sum(weights, 1)
            result += dot(narrow(weights, v.dtype.element_ty, EXACT), v_b, EXACT)
        result = result / tl.where(total == 0, 1.0, total)[:, None]
        rows_o = n * o_n + h * o_h + at_t * o_t
        store_tile(out, result, rows_o, columns, o_d, valid_t, D, EXACT)


@SIGNATURE.checked
def text_attention(given: TextAttentionArguments) -> Tensor:
    """Computes cross attention to short text with the kernel.

    Returns:
        (N, H, T, D), laid out in memory as (N, T, H, D). Queries without any key give 0.

    Raises:
        ValueError: if an argument is not as :class:`TextAttentionArguments` states.
    """
    q, k, v, mask, lengths, scale = given
    (N, H, T, D), (M, _, S, _) = q.shape, k.shape
    out = allocate(q)
    backend = target_of(q.device).gpu.backend
    config = configure(T, S, D, q.element_size(), backend, mask_kind(mask))
    strides = [strides_of(x, 4) for x in (q, k, v, out, mask)]
    num_blocks = N // M * triton.cdiv(T, config["BLOCK_T"])
    text_attention_kernel[(triton.cdiv(num_blocks, config["BLOCKS"]), M * H)](
        q, k, v, out,
        q if mask is None else mask,  # q stands in for what is not given, and is not read
        q if lengths is None else lengths.contiguous(),
        *(stride for each in strides for stride in each),
        H, T, S, N // M, D**-0.5 if scale is None else scale,
        D=D, MASK=mask_kind(mask), LENGTHS=lengths is not None, EXACT=INTERPRETED, **config,
    )  # fmt: skip
    return out


def fits(S: int, D: int, itemsize: int, target: Target) -> bool:
    """Returns True if a program can hold S keys and values of D channels on a GPU.

    Triton keeps them in registers on AMD GPUs, and else in shared memory, beside a block of queries
    and their weights.
    """
    rows = sum(split_in_two(S))
    columns = max(next_power_of_2(D), 16)
    if S > MAX_KEYS:
        return False
    if target.gpu.backend == "hip":
        return rows * columns * itemsize <= 128 * 128 * 2
    shared = (2 * rows * columns + MOST_QUERIES * (rows + columns)) * itemsize
    return shared <= target.shared


def configure(T: int, S: int, D: int, itemsize: int, backend: str, mask: int) -> dict[str, int]:
    """Returns queries of a block, blocks of a program, tiles of keys and channels, and warps.

    Half the queries in float32, and where a mask that is added is read beside many scores.
    """
    first, second = split_in_two(S)
    is_heavy = itemsize == 4 or (mask == 2 and first + second > 256)
    block_t = MOST_QUERIES // 2 if is_heavy else MOST_QUERIES
    return {
        "COLUMNS": max(next_power_of_2(D), 16),
        "KEYS_A": first,
        "KEYS_B": second,
        "BLOCK_T": min(block_t, max(next_power_of_2(T), 16)),
        "BLOCKS": 8,
        "num_warps": 4 if backend == "hip" else 8,
        "num_stages": 1,
    }


OP = SIGNATURE.register(
    launch=text_attention,
    reference=text_attention_reference,
    allocate=lambda given: allocate(given.q),
)
