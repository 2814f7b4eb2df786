"""Attention over sequences of up to 64 tokens, many of them: a video model's temporal attention.

    N  rows of the batch; H  heads; T  queries of a sequence; S  its keys; D  channels of a head
    B, P  a batch of two dimensions in place of N: videos, and the positions of a frame

One program takes as many whole sequences as fit into 64 rows, side by side: a product of all their
queries with all their keys, of which each sequence keeps its own block. What is thrown away costs
less than it takes to read the rows, since at these lengths memory is the bound: each element of q,
k and v is read once, at any strides, and each element of the output written once. So the copies
that put the frames of a position side by side are not needed: what comes in may be a view of a
projection's output (B, T, P, 3 * H * D), and what goes out is laid out as (B, T, P, H * D), which
the next projection reads.

On the way in, queries and keys may be normalized over their channels (RMS) and turned by their
position (rotary embedding): the two channels of a pair are then two tiles, whose products add up.

    T = S = 2, H = 2:  rows (head, frame) a0 a1 b0 b1     scores  a0 a1 b0 b1
                                                              a0   x  x  .  .
                                                              a1   x  x  .  .
                                                              b0   .  .  x  x
                                                              b1   .  .  x  x
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import chain, product

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
    check_attention,
    mask_kind,
    strides_of,
    type_of_mask,
)
from .registration import check, register
from .targets import Specialization

MAX_LENGTH = 64
"""Of queries and of keys."""
ROWS = 64
"""Rows of queries, and of keys, that one program takes at most."""
PAIRS = ("none", "halves", "neighbors")
"""Which two channels a rotary embedding turns into one another: channel i and i + D/2, or 2i and
2i + 1."""


def short_attention_reference(
    q_NHTD: Tensor,
    k_NHSD: Tensor,
    v_NHSD: Tensor,
    mask: Tensor | None = None,
    q_weight_D: Tensor | None = None,
    k_weight_D: Tensor | None = None,
    cos_TD: Tensor | None = None,
    sin_TD: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    pairs: str = "none",
) -> Tensor:
    """The same by PyTorch's ops, in float32."""
    dtype = q_NHTD.dtype
    q, k, v = (x.float() for x in (q_NHTD, k_NHSD, v_NHSD))
    q, k = _normalize(q, q_weight_D, eps), _normalize(k, k_weight_D, eps)
    if cos_TD is not None and sin_TD is not None:
        q, k = (_turn(x, cos_TD.float(), sin_TD.float(), pairs) for x in (q, k))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    found = attend(q, k, v, mask, None, scale).to(dtype)
    return allocate(found).copy_(found)


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
def _load_pairs(
    base, rows_T, stride_d, valid_T, D: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr
):  # fmt: skip
    """Rows as two tiles in float32: the first channel of each pair, and the second one."""
    if PAIRS == 1:
        pair = tl.arange(0, HALF)
        valid = valid_T[:, None] & (pair < D // 2)[None, :]
        at = base + rows_T[:, None] + (pair * stride_d)[None, :]
        a = tl.load(at, mask=valid, other=0.0)
        b = tl.load(at + (D // 2) * stride_d, mask=valid, other=0.0)
    else:
        channel = tl.arange(0, 2 * HALF)
        valid = valid_T[:, None] & (channel < D)[None, :]
        at = base + rows_T[:, None] + (channel * stride_d)[None, :]
        x = tl.load(at, mask=valid, other=0.0)
        a, b = tl.split(tl.reshape(x, [x.shape[0], HALF, 2]))
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _load_turned(
    base, rows_T, stride_d, valid_T, weight, cos, sin, position_T,
    D: tl.constexpr, HALF: tl.constexpr, eps, NORM: tl.constexpr, PAIRS: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Rows of q or k after the norm and the rotary embedding, the channels of a pair side by side:
    scores do not depend on the order of channels.

    Padding is 0 as it is; saying so has the arithmetic done where each element is once. Triton
    would do it after it moved what was loaded to where the product wants it, many times over.
    """
    a, b = _load_pairs(base, rows_T, stride_d, valid_T, D, HALF, PAIRS)
    if NORM:
        inverse_T1 = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1))[:, None] / D + eps)
        row = tl.zeros([1], tl.int64)
        gain_a, gain_b = _load_pairs(weight, row, 1, row == 0, D, HALF, PAIRS)
        a, b = a * inverse_T1 * gain_a, b * inverse_T1 * gain_b
    cos_a, cos_b = _load_pairs(cos, position_T * D, 1, valid_T, D, HALF, PAIRS)
    sin_a, sin_b = _load_pairs(sin, position_T * D, 1, valid_T, D, HALF, PAIRS)
    dtype = base.dtype.element_ty
    turned = tl.join(a * cos_a - b * sin_a, b * cos_b + a * sin_b)
    turned = tl.reshape(turned, [a.shape[0], 2 * HALF])
    turned = tl.where((tl.arange(0, 2 * HALF) < D)[None, :], turned, 0.0)
    return narrow(turned, dtype, EXACT)


@triton.jit
def _load_normed(
    base, rows_T, columns_D, stride_d, valid_TD, weight,
    D: tl.constexpr, eps, NORM: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Rows of q or k after the norm; as they are without one."""
    x = tl.load(base + rows_T[:, None] + (columns_D * stride_d)[None, :], mask=valid_TD, other=0.0)
    if NORM:
        y = x.to(tl.float32)
        gain = tl.load(weight + columns_D, mask=columns_D < D, other=0.0).to(tl.float32)
        y = y * tl.rsqrt(tl.sum(y * y, 1)[:, None] / D + eps) * gain[None, :]
        x = narrow(y, x.dtype, EXACT)
    return x


@triton.jit
def _short_attention_kernel(
    q, k, v, out, mask, q_weight, k_weight, cos, sin,
    q_b, q_p, q_h, q_t, q_d, k_b, k_p, k_h, k_t, k_d, v_b, v_p, v_h, v_t, v_d,
    o_b, o_p, o_h, o_t, o_d, m_b, m_p, m_h, m_t, m_s,
    P, num_sequences, scale, eps,
    H: tl.constexpr, T: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    MASK: tl.constexpr, NORM: tl.constexpr, PAIRS: tl.constexpr,
    GROUP: tl.constexpr, ROWS_T: tl.constexpr, ROWS_S: tl.constexpr, COLUMNS: tl.constexpr,
    HALF: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """GROUP sequences: heads of one place of the batch lie side by side in memory."""
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
        x_q = _load_turned(
            q, rows_q, q_d, valid_t, q_weight, cos, sin, t, D, HALF, eps, NORM, PAIRS, EXACT
        )
        x_k = _load_turned(
            k, rows_k, k_d, valid_s, k_weight, cos, sin, s, D, HALF, eps, NORM, PAIRS, EXACT
        )
    else:
        x_q = _load_normed(q, rows_q, columns, q_d, valid_td, q_weight, D, eps, NORM, EXACT)
        x_k = _load_normed(k, rows_k, columns, k_d, valid_sd, k_weight, D, eps, NORM, EXACT)
    scores = dot(x_q, tl.trans(x_k), EXACT) * scale
    own = (group_t[:, None] == group_s[None, :]) & valid_t[:, None] & valid_s[None, :]
    rows_m = b_t * m_b + p_t * m_p + h_t * m_h + t * m_t
    scores = add_mask(scores, mask, rows_m[:, None] + (s * m_s)[None, :], own, MASK)
    top = tl.maximum(tl.max(scores, 1), LOWEST)  # of a row that is masked whole
    weights = tl.exp(scores - top[:, None])
    total = tl.sum(weights, 1)
    x_v = tl.load(
        v + (b_s * v_b + p_s * v_p + h_s * v_h + s * v_t)[:, None] + (columns * v_d)[None, :],
        mask=valid_sd,
        other=0.0,
    )
    found = dot(narrow(weights, x_v.dtype, EXACT), x_v, EXACT)
    found = found / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(
        out + (b_t * o_b + p_t * o_p + h_t * o_h + t * o_t)[:, None] + (columns * o_d)[None, :],
        narrow(found, out.dtype.element_ty, EXACT),
        mask=valid_td,
    )


def short_attention(
    q_NHTD: Tensor,
    k_NHSD: Tensor,
    v_NHSD: Tensor,
    mask: Tensor | None = None,
    q_weight_D: Tensor | None = None,
    k_weight_D: Tensor | None = None,
    cos_TD: Tensor | None = None,
    sin_TD: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    pairs: str = "none",
) -> Tensor:
    """Attention of short sequences, by the kernel.

    Args:
        q_NHTD, k_NHSD, v_NHSD: at any strides; T and S up to :data:`MAX_LENGTH`, D up to
            :data:`MAX_HEAD_DIM`. Or of five dimensions, (B, P, H, T, D).
        mask: of bools (True takes part) or to be added, broadcast to (N, H, T, S), or to
            (B, P, H, T, S).
        q_weight_D, k_weight_D: of the RMS norms over channels; both or none.
        cos_TD, sin_TD: of a rotary embedding; T and S are then equal.
        scale: of the scores; by default D ** -0.5.
        pairs: one of :data:`PAIRS`.

    Returns:
        (N, H, T, D), in memory by N, T, H, D; or (B, P, H, T, D), by B, T, P, H, D. Rows that the
        mask leaves no key are 0.

    Raises:
        ValueError: naming the argument, what was expected and what was found.
    """
    _check(q_NHTD, k_NHSD, v_NHSD, mask, q_weight_D, k_weight_D, cos_TD, sin_TD, pairs)
    *places, H, T, D = q_NHTD.shape
    S = k_NHSD.shape[-2]
    out = allocate(q_NHTD)
    is_apart = any(x.stride(-1) != 1 for x in (q_NHTD, k_NHSD, v_NHSD))
    norms, turns = q_weight_D is not None, pairs != "none"
    taken = configure(T, S, D, q_NHTD.element_size(), norms, turns, is_apart=is_apart)
    num_sequences = math.prod(places) * H
    strides = [_strides_of_5(x) for x in (q_NHTD, k_NHSD, v_NHSD, out, mask)]
    place = q_NHTD  # of arguments that are not there
    _short_attention_kernel[(triton.cdiv(num_sequences, taken["GROUP"]),)](
        q_NHTD, k_NHSD, v_NHSD, out,
        place if mask is None else mask,
        place if q_weight_D is None else q_weight_D.contiguous(),
        place if k_weight_D is None else k_weight_D.contiguous(),
        place if cos_TD is None else cos_TD.contiguous(),
        place if sin_TD is None else sin_TD.contiguous(),
        *chain.from_iterable(strides),
        places[1] if len(places) == 2 else 1,
        num_sequences, D**-0.5 if scale is None else scale, eps,
        H=H, T=T, S=S, D=D,
        MASK=mask_kind(mask),
        NORM=q_weight_D is not None, PAIRS=PAIRS.index(pairs),
        EXACT=INTERPRETED, **taken,
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
    """How much one program takes of sequences of T queries and S keys, and by how many warps.

    Half the rows where registers would not do: for float32, for what is both normalized and
    turned, and for channels that lie apart; twice the warps there, where q and k are turned, and
    for more than 64 channels.
    """
    is_heavy = itemsize == 4 or is_apart or (norms and turns)
    group = max((ROWS // 2 if is_heavy else ROWS) // max(T, S), 1)
    sizes = {"ROWS_T": group * T, "ROWS_S": group * S, "COLUMNS": D, "HALF": (D + 1) // 2}
    return {
        "GROUP": group,
        **{name: max(next_power_of_2(size), 16) for name, size in sizes.items()},
        "num_warps": 8 if is_heavy or turns or D > 64 else 4,
    }


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    pairs: str,
) -> None:
    def need(argument: str, expected: str, found: object, is_right: bool) -> None:
        check("short_attention", argument, expected, found, is_right)

    check_attention("short_attention", q, k, v, mask, num_dims=(4, 5))
    T, S, D = q.shape[-2], k.shape[-2], q.shape[-1]
    for name, length in (("q", T), ("k", S)):
        need(name, f"1 to {MAX_LENGTH} tokens", length, length <= MAX_LENGTH)
    given = q_weight is not None
    need(
        "k_weight", "given where q_weight is", k_weight is not None, given == (k_weight is not None)
    )
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            need(name, f"({D},)", tuple(weight.shape), weight.shape == (D,))
    need("pairs", f"one of {PAIRS}", pairs, pairs in PAIRS)
    turns = pairs != "none"
    for name, table in (("cos", cos), ("sin", sin)):
        is_given = table is not None
        need(name, "given where pairs is, and only there", is_given, turns == is_given)
        if table is not None:
            need(name, f"({T}, {D})", tuple(table.shape), table.shape == (T, D))
    if turns:
        need("k", f"as many tokens as q, {T}", S, S == T)
        need("q", "an even head dim, for a rotary embedding", D, D % 2 == 0)


SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? mask=None, Tensor? q_weight=None, "
    "Tensor? k_weight=None, Tensor? cos=None, Tensor? sin=None, float? scale=None, "
    'float eps=1e-6, str pairs="none") -> Tensor'
)
OP = register(
    "short_attention",
    SCHEMA,
    launch=short_attention,
    reference=short_attention_reference,
    allocate=allocate,
)


def specializations() -> Iterator[Specialization]:
    """What is compiled for the shapes of video models: by dtype, frames, head dim and options."""
    plain = {"MASK": 0, "NORM": False, "PAIRS": 0}
    for dtype, T, D in product(("bf16", "fp16"), (8, 16, 32, 64), (32, 64, 72, 96, 128)):
        yield _specialize(dtype, T, D, "", plain)
    for T, (name, others) in product((16, 30, 64), OPTIONS.items()):
        yield _specialize("bf16", T, 72, name, {**plain, **others})
    for T in (16, 32):
        yield _specialize("fp32", T, 64, "", plain)


OPTIONS: dict[str, dict[str, int]] = {
    "mask of bools": {"MASK": 1},
    "mask that is added": {"MASK": 2},
    "RMS norm": {"NORM": True},
    "rotary, halves": {"PAIRS": 1},
    "rotary, neighbors": {"PAIRS": 2},
    "all": {"MASK": 1, "NORM": True, "PAIRS": 1},
    "channels apart": {"q_d": 2, "k_d": 2, "v_d": 2},
}


def _specialize(
    dtype: str, T: int, D: int, label: str, constants: Mapping[str, int]
) -> Specialization:
    """As Triton does it itself for one call: a stride of 1 is a constant. Channels that lie apart
    have any stride here."""
    names = _short_attention_kernel.arg_names
    itemsize = 4 if dtype == "fp32" else 2
    strides = {"q_d": 1, "k_d": 1, "v_d": 1, "o_d": 1}
    values = {"H": 16, "T": T, "S": T, "D": D, "EXACT": False, **strides, **constants}
    apart = [name for name in strides if values[name] != 1]
    taken = configure(
        T, T, D, itemsize, bool(values["NORM"]), values["PAIRS"] != 0, is_apart=bool(apart)
    )
    num_warps = taken.pop("num_warps")
    values = {name: value for name, value in (values | taken).items() if name not in apart}
    types = dict.fromkeys(names[:9], f"*{dtype}") | {"scale": "fp32", "eps": "fp32"}
    types |= {"P": "i32", "num_sequences": "i32"}
    types["mask"] = type_of_mask(values["MASK"], dtype)
    signature = {n: "constexpr" if n in values else types.get(n, "i64") for n in names}
    title = f"{dtype} T={T} D={D} {label}".strip()
    return Specialization(title, _short_attention_kernel, signature, values, num_warps)
