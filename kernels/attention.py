"""Attention of any length: spatial, full and joint attention of video and image models.

    N  rows of the batch; H  heads; T  queries of a sequence; S  its keys; D  channels of a head

One program takes a block of queries of one head and goes through the keys block by block, with a
running maximum and a running sum of each query's weights (online softmax), so that scores are never
in memory. Channels are two tiles where their number is not a power of two, say 64 + 16 for 72, so
that neither memory nor products are padded to 128. Where keys are many, all blocks but the last are
whole and need no bounds.

    scores of a query, two blocks of two keys: [1, 2] then [4, 0]
        maximum 2, sum e^-1 + 1, values weighted so;  then all of it times e^(2 - 4)
        maximum 4, sum (e^-1 + 1) e^-2 + 1 + e^-4:    the same as of [1, 2, 4, 0] at once
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product

import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import INTERPRETED, dot, narrow, next_power_of_2
from .attention_parts import (
    LOG2_E,
    LOWEST,
    add_mask,
    allocate,
    attend,
    check_attention,
    check_lengths,
    load_tile,
    mask_kind,
    split_in_two,
    store_tile,
    strides_of,
    type_of_mask,
)
from .registration import register
from .targets import Specialization


def attention_reference(
    q_NHTD: Tensor,
    k_NHSD: Tensor,
    v_NHSD: Tensor,
    mask: Tensor | None = None,
    lengths_N: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The same by PyTorch's ops, in float32."""
    q, k, v = (x.float() for x in (q_NHTD, k_NHSD, v_NHSD))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    found = attend(q, k, v, mask, lengths_N, scale).to(q_NHTD.dtype)
    return allocate(found).copy_(found)


@triton.jit
def _attend_block(
    q_a, q_b, acc_a, acc_b, top, total,
    k, v, mask, rows_m, m_s, valid_t, start, length, k_s, k_d, v_s, v_d, scale,
    D: tl.constexpr, COLUMNS_A: tl.constexpr, COLUMNS_B: tl.constexpr, BLOCK_S: tl.constexpr,
    MASK: tl.constexpr, BOUNDS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The block of keys from `start` on. Scores are in units of log 2: 2 ** x is what GPUs have."""
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
def _attention_kernel(
    q, k, v, out, mask, lengths,
    q_n, q_h, q_t, q_d, k_n, k_h, k_s, k_d, v_n, v_h, v_s, v_d, o_n, o_h, o_t, o_d,
    m_n, m_h, m_t, m_s,
    H, T, S, scale,
    D: tl.constexpr, COLUMNS_A: tl.constexpr, COLUMNS_B: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    MASK: tl.constexpr, LENGTHS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
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


def attention(
    q_NHTD: Tensor,
    k_NHSD: Tensor,
    v_NHSD: Tensor,
    mask: Tensor | None = None,
    lengths_N: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention, by the kernel.

    Args:
        q_NHTD, k_NHSD, v_NHSD: at any strides; D up to
            :data:`~pabc.kernels.attention_parts.MAX_HEAD_DIM`.
        mask: of bools (True takes part) or to be added, broadcast to (N, H, T, S).
        lengths_N: how many keys of each row of the batch take part, the first ones.
        scale: of the scores; by default D ** -0.5.

    Returns:
        (N, H, T, D), in memory by N, T, H, D. Queries without any key are 0.

    Raises:
        ValueError: naming the argument, what was expected and what was found.
    """
    check_attention("attention", q_NHTD, k_NHSD, v_NHSD, mask, num_dims=(4,))
    check_lengths("attention", q_NHTD, lengths_N)
    N, H, T, D = q_NHTD.shape
    S = k_NHSD.shape[2]
    out = allocate(q_NHTD)
    taken = configure(T, S, D, q_NHTD.element_size(), mask_kind(mask))
    strides = [strides_of(x, 4) for x in (q_NHTD, k_NHSD, v_NHSD, out, mask)]
    place = q_NHTD  # of arguments that are not there
    _attention_kernel[(triton.cdiv(T, taken["BLOCK_T"]), N * H)](
        q_NHTD, k_NHSD, v_NHSD, out,
        place if mask is None else mask,
        place if lengths_N is None else lengths_N.contiguous(),
        *(stride for each in strides for stride in each),
        H, T, S, D**-0.5 if scale is None else scale,
        D=D, MASK=mask_kind(mask), LENGTHS=lengths_N is not None, EXACT=INTERPRETED, **taken,
    )  # fmt: skip
    return out


def configure(T: int, S: int, D: int, itemsize: int, mask: int) -> dict[str, int]:
    """Blocks of queries and keys, tiles of channels, warps, stages.

    128 queries and 64 keys, as far as registers and the shared memory of every target do: half the
    queries where a mask is read beside the scores, half the keys above 96 channels, which are two
    tiles beside a mask; less of all in float32, whose products have no hardware of their own.
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


SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? mask=None, Tensor? lengths=None, float? scale=None) "
    "-> Tensor"
)
OP = register(
    "attention", SCHEMA, launch=attention, reference=attention_reference, allocate=allocate
)


def specializations() -> Iterator[Specialization]:
    """What is compiled for the shapes of video models: by dtype, head dim and options."""
    for dtype, D in product(("bf16", "fp16"), (64, 72, 80, 96, 128)):
        yield _specialize(dtype, D, "", {})
    for D, (name, others) in product((64, 72, 128), OPTIONS.items()):
        yield _specialize("bf16", D, name, others)
    yield _specialize("fp32", 64, "", {})


OPTIONS: dict[str, dict[str, int]] = {
    "mask of bools": {"MASK": 1},
    "mask that is added": {"MASK": 2},
    "lengths": {"LENGTHS": True},
}


def _specialize(dtype: str, D: int, label: str, constants: Mapping[str, int]) -> Specialization:
    """As Triton does it itself for one call: a stride of 1 is a constant."""
    names = _attention_kernel.arg_names
    strides = {"q_d": 1, "k_d": 1, "v_d": 1, "o_d": 1}
    values = {"D": D, "MASK": 0, "LENGTHS": False, "EXACT": False, **strides, **constants}
    taken = configure(1024, 1024, D, 4 if dtype == "fp32" else 2, values["MASK"])
    num_warps, num_stages = taken.pop("num_warps"), taken.pop("num_stages")
    values |= taken
    types = dict.fromkeys(names[:4], f"*{dtype}") | {"lengths": "*i64", "scale": "fp32"}
    types |= dict.fromkeys(("H", "T", "S"), "i32")
    types["mask"] = type_of_mask(values["MASK"], dtype)
    signature = {n: "constexpr" if n in values else types.get(n, "i64") for n in names}
    unaligned = ("mask", "lengths", "m_n", "m_h", "m_t", "m_s")
    aligned = [n for n in names[: names.index("H")] if n not in values and n not in unaligned]
    title = f"{dtype} D={D} {label}".strip()
    return Specialization(
        title, _attention_kernel, signature, values, num_warps, num_stages, tuple(aligned)
    )
