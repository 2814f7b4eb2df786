"""Attention over sequences of up to 64 tokens, many of them: a video model's temporal attention.

    N  rows of the batch; H  heads; T  queries of a sequence; S  its keys; D  channels of a head
    B, P  a batch of two dimensions in place of N: videos, and the positions of a frame

One program takes as many whole sequences as fit into 64 rows: it multiplies all their queries with
all their keys, and keeps the blocks on the diagonal, one for each sequence. At these lengths memory
is the bound, so the discarded products cost less than reading the rows. Each element of q, k and v
is read once, at any strides, and each element of the output is written once. No copies are needed
to put the frames of a position next to each other: q, k and v may be views of a projection's output
(B, T, P, 3 * H * D), and the result is laid out as the next projection reads it, (B, T, P, H * D).

Queries and keys may be normalized over their channels (RMS) and turned by their position (rotary
embedding) as they are loaded; the two channels of each pair are then loaded as two tiles.

    T = S = 2, H = 2:  rows (head, frame) a0 a1 b0 b1     scores  a0 a1 b0 b1
                                                              a0   x  x  .  .
                                                              a1   x  x  .  .
                                                              b0   .  .  x  x
                                                              b1   .  .  x  x

    scores of a0 with a0 and a1: [0, log 3], values [[1], [5]]: weights [1/4, 3/4], result [4]
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from typing import Annotated, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import INTERPRETED, dot, narrow, next_power_of_2
from .attention_parts import (
    LOWEST,
    add_mask,
    allocate,
    attend,
    constrain_attention,
    mask_kind,
    strides_of,
)
from .registration import Constraint, KernelSignature, TensorSpec
from .rotary import load_normed, load_turned

MAX_LENGTH = 64
"""Queries, and keys, of a sequence at most."""
ROWS = 64
"""Rows of queries, and of keys, of one program at most."""
FEW_ROWS = 32
"""Rows for which four warps have the registers, whatever the arguments."""
PAIRS = ("none", "halves", "neighbors")
"""The pairs of channels that a rotary embedding turns: i and i + D/2 (halves), or 2i and 2i + 1."""


class ShortAttentionArguments(NamedTuple):
    """The arguments of :func:`short_attention`.

    Attributes:
        q, k, v: queries, keys and values at any strides, (N, H, T or S, D) or (B, P, H, T or S, D).
            T and S are at most :data:`MAX_LENGTH`.
        mask: bools (True takes part) or numbers to add to scores, broadcast to (N, H, T, S), or to
            (B, P, H, T, S).
        q_weight, k_weight: weights of the RMS norms over channels; both or none.
        cos, sin: tables of a rotary embedding; T and S are then equal.
        scale: a factor of scores; by default D ** -0.5.
        eps: of the RMS norms.
        pairs: one of :data:`PAIRS`.
    """

    q: Annotated[Tensor, TensorSpec("(..., H, T, D)")]
    k: Annotated[Tensor, TensorSpec("(..., H, S, D)", dtypes="q")]
    v: Annotated[Tensor, TensorSpec("(..., H, S, D)", dtypes="q")]
    mask: Annotated[Tensor | None, TensorSpec("(..., H, T, S)", broadcast=True)] = None
    q_weight: Annotated[Tensor | None, TensorSpec("(D,)")] = None
    k_weight: Annotated[Tensor | None, TensorSpec("(D,)")] = None
    cos: Annotated[Tensor | None, TensorSpec("(T, D)")] = None
    sin: Annotated[Tensor | None, TensorSpec("(T, D)")] = None
    scale: float | None = None
    eps: float = 1e-6
    pairs: str = "none"

    def constraints(self) -> Iterator[Constraint]:
        """Yields sizes, and which arguments go together."""
        q, k = self.q, self.k
        T, S, D = q.shape[-2], k.shape[-2], q.shape[-1]
        expected = "4 dimensions (N, H, T, D) or 5 dimensions (B, P, H, T, D)"
        yield "q", expected, tuple(q.shape), q.dim() in (4, 5)
        yield from constrain_attention(q, k, self.mask)
        for name, length in (("q", T), ("k", S)):
            yield name, f"1 to {MAX_LENGTH} tokens", length, length <= MAX_LENGTH
        has_k_weight = self.k_weight is not None
        is_right = has_k_weight == (self.q_weight is not None)
        yield "k_weight", "given where q_weight is", has_k_weight, is_right
        yield "pairs", f"one of {PAIRS}", self.pairs, self.pairs in PAIRS
        turns = self.pairs != "none"
        for name, is_given in (("cos", self.cos is not None), ("sin", self.sin is not None)):
            yield name, "given where pairs is, and only there", is_given, turns == is_given
        if turns:
            yield "k", f"as many tokens as q, {T}", S, S == T
            yield "q", "an even head dim, for a rotary embedding", D, D % 2 == 0


SIGNATURE = KernelSignature("short_attention", ShortAttentionArguments)


@SIGNATURE.checked
def short_attention_reference(given: ShortAttentionArguments) -> Tensor:
    """Computes the same with PyTorch's ops, in float32."""
    q, k, v = (x.float() for x in (given.q, given.k, given.v))
    q, k = _normalize(q, given.q_weight, given.eps), _normalize(k, given.k_weight, given.eps)
    if given.cos is not None and given.sin is not None:
        q, k = (_turn(x, given.cos.float(), given.sin.float(), given.pairs) for x in (q, k))
    scale = q.shape[-1] ** -0.5 if given.scale is None else given.scale
    result = attend(q, k, v, given.mask, None, scale).to(given.q.dtype)
    return allocate(result).copy_(result)


def _normalize(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def _turn(x: Tensor, cos: Tensor, sin: Tensor, pairs: str) -> Tensor:
    if pairs == "halves":
        a, b = x.chunk(2, -1)
        partner = torch.cat([-b, a], -1)
    else:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        partner = torch.stack([-b, a], -1).flatten(-2)
    return x * cos + partner * sin


@triton.jit
def short_attention_kernel(
    q, k, v, out, mask, q_weight, k_weight, cos, sin,
    q_b, q_p, q_h, q_t, q_d, k_b, k_p, k_h, k_t, k_d, v_b, v_p, v_h, v_t, v_d,
    o_b, o_p, o_h, o_t, o_d, m_b, m_p, m_h, m_t, m_s,
    P, num_sequences, scale, eps,
    H: tl.constexpr, T: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    MASK: tl.constexpr, NORM: tl.constexpr, PAIRS: tl.constexpr,
    GROUP: tl.constexpr, ROWS_T: tl.constexpr, ROWS_S: tl.constexpr, COLUMNS: tl.constexpr,
    HALF: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Computes GROUP sequences: neighboring heads, which are next to each other in memory."""
    first = tl.program_id(0) * GROUP
    row_t, row_s = tl.arange(0, ROWS_T), tl.arange(0, ROWS_S)
    group_t, group_s = row_t // T, row_s // S
    t, s = (row_t % T).to(tl.int64), (row_s % S).to(tl.int64)
    sequence_t, sequence_s = first + group_t, first + group_s
    valid_t = (group_t < GROUP) & (sequence_t < num_sequences)
    valid_s = (group_s < GROUP) & (sequence_s < num_sequences)
    h_t, h_s = (sequence_t % H).to(tl.int64), (sequence_s % H).to(tl.int64)
    place_t, place_s = sequence_t // H, sequence_s // H
    b_t, p_t = (place_t // P).to(tl.int64), (place_t % P).to(tl.int64)
    b_s, p_s = (place_s // P).to(tl.int64), (place_s % P).to(tl.int64)

    rows_q = b_t * q_b + p_t * q_p + h_t * q_h + t * q_t
    rows_k = b_s * k_b + p_s * k_p + h_s * k_h + s * k_t
    columns = tl.arange(0, COLUMNS)
    inside = columns[None, :] < D
    valid_td, valid_sd = valid_t[:, None] & inside, valid_s[:, None] & inside
    if PAIRS != 0:
        x_q = load_turned(
            q, rows_q, q_d, valid_t, q_weight, cos, sin, t, D, HALF, eps, NORM, PAIRS, EXACT
        )
        x_k = load_turned(
            k, rows_k, k_d, valid_s, k_weight, cos, sin, s, D, HALF, eps, NORM, PAIRS, EXACT
        )
    else:
        x_q = load_normed(q, rows_q, columns, q_d, valid_td, q_weight, D, eps, NORM, EXACT)
        x_k = load_normed(k, rows_k, columns, k_d, valid_sd, k_weight, D, eps, NORM, EXACT)
    scores = dot(x_q, tl.trans(x_k), EXACT) * scale
    own = (group_t[:, None] == group_s[None, :]) & valid_t[:, None] & valid_s[None, :]
    rows_m = b_t * m_b + p_t * m_p + h_t * m_h + t * m_t
    scores = add_mask(scores, mask, rows_m[:, None] + (s * m_s)[None, :], own, MASK)
    top = tl.maximum(tl.max(scores, 1), LOWEST)  # LOWEST: where all keys are masked
    weights = tl.exp(scores - top[:, None])
    total = tl.sum(weights, 1)
    x_v = tl.load(
        v + (b_s * v_b + p_s * v_p + h_s * v_h + s * v_t)[:, None] + (columns * v_d)[None, :],
        mask=valid_sd,
        other=0.0,
    )
    result = dot(narrow(weights, x_v.dtype, EXACT), x_v, EXACT)
    result = result / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(
        out + (b_t * o_b + p_t * o_p + h_t * o_h + t * o_t)[:, None] + (columns * o_d)[None, :],
        narrow(result, out.dtype.element_ty, EXACT),
        mask=valid_td,
    )


@SIGNATURE.checked
def short_attention(given: ShortAttentionArguments) -> Tensor:
    """Computes attention over short sequences with the kernel.

    Returns:
        (N, H, T, D), laid out in memory as (N, T, H, D); or (B, P, H, T, D), as (B, T, P, H, D).
        Queries that the mask leaves no key give 0.

    Raises:
        ValueError: if an argument is not as :class:`ShortAttentionArguments` states.
    """
    q, k, v, mask, q_weight, k_weight, cos, sin, scale, eps, pairs = given
    *places, H, T, D = q.shape
    S = k.shape[-2]
    out = allocate(q)
    is_apart = any(x.stride(-1) != 1 for x in (q, k, v))
    norms, turns = q_weight is not None, pairs != "none"
    config = configure(T, S, D, q.element_size(), norms, turns, is_apart=is_apart)
    num_sequences = math.prod(places) * H
    strides = [_strides_of_5(x) for x in (q, k, v, out, mask)]
    short_attention_kernel[(triton.cdiv(num_sequences, config["GROUP"]),)](
        q, k, v, out,
        q if mask is None else mask,  # q stands in for what is not given, and is not read
        *(q if x is None else x.contiguous() for x in (q_weight, k_weight, cos, sin)),
        *chain.from_iterable(strides),
        places[1] if len(places) == 2 else 1,
        num_sequences, D**-0.5 if scale is None else scale, eps,
        H=H, T=T, S=S, D=D,
        MASK=mask_kind(mask), NORM=norms, PAIRS=PAIRS.index(pairs),
        EXACT=INTERPRETED, **config,
    )  # fmt: skip
    return out


def _strides_of_5(x: Tensor | None) -> list[int]:
    if x is None or x.dim() == 5:
        return strides_of(x, 5)
    first, *others = strides_of(x, 4)
    return [first, 0, *others]


def configure(
    T: int, S: int, D: int, itemsize: int, norms: bool, turns: bool, *, is_apart: bool
) -> dict[str, int]:
    """Returns the sequences, rows, padded channels and warps of one program.

    Half the rows where registers would not suffice: in float32, with both norm and rotary
    embedding, and with channels that are not contiguous. Twice the warps for these, for a rotary
    embedding alone, and for more than 64 channels, unless there are few rows.
    """
    is_heavy = itemsize == 4 or is_apart or (norms and turns)
    group = max((ROWS // 2 if is_heavy else ROWS) // max(T, S), 1)
    sizes = {"ROWS_T": group * T, "ROWS_S": group * S, "COLUMNS": D, "HALF": (D + 1) // 2}
    blocks = {name: max(next_power_of_2(size), 16) for name, size in sizes.items()}
    is_large = (is_heavy or turns or D > 64) and max(blocks["ROWS_T"], blocks["ROWS_S"]) > FEW_ROWS
    return {"GROUP": group, **blocks, "num_warps": 8 if is_large else 4}


OP = SIGNATURE.register(
    launch=short_attention,
    reference=short_attention_reference,
    allocate=lambda given: allocate(given.q),
)
