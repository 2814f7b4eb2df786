"""Cross attention to short text, whose keys and values stay on chip.

    N  rows of the batch; H  heads; T  queries of a sequence; S  keys, those of the text
    M  rows of the text, R  how many rows of the batch share one (the frames of a video): N = M * R
    D  channels of a head

One program loads all keys and values of one text and head once, and goes through many blocks of
queries with them, over all frames that share the text. All scores of a query are there at once, so
that its softmax needs no running maximum.

    R = 2, T = 3, blocks of two queries, three blocks a program:
        program 0: frame 0 queries 0 1, frame 0 query 2, frame 1 queries 0 1;  program 1: the rest
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product

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
    check_lengths,
    load_tile,
    mask_kind,
    split_in_two,
    store_tile,
    strides_of,
    type_of_mask,
)
from .registration import check, register
from .targets import TARGETS, Specialization, Target, target_of

MAX_KEYS = 512
MOST_QUERIES = 32
"""Of a block."""


def text_attention_reference(
    q_NHTD: Tensor,
    k_MHSD: Tensor,
    v_MHSD: Tensor,
    mask: Tensor | None = None,
    lengths_N: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The same by PyTorch's ops, in float32."""
    repeats = len(q_NHTD) // len(k_MHSD)
    q, k, v = (x.float() for x in (q_NHTD, k_MHSD, v_MHSD))
    k, v = (x.repeat_interleave(repeats, 0) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    found = attend(q, k, v, mask, lengths_N, scale).to(q_NHTD.dtype)
    return allocate(found).copy_(found)


@triton.jit
def _find_scores(
    x_q, x_k, mask, rows_m, s, m_s, valid_t, length, scale,
    MASK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    valid = valid_t[:, None] & (s < length)[None, :]
    at = rows_m[:, None] + (s.to(tl.int64) * m_s)[None, :]
    return add_mask(dot(x_q, tl.trans(x_k), EXACT) * scale, mask, at, valid, MASK)


@triton.jit
def _text_attention_kernel(
    q, k, v, out, mask, lengths,
    q_n, q_h, q_t, q_d, k_m, k_h, k_s, k_d, v_m, v_h, v_s, v_d, o_n, o_h, o_t, o_d,
    m_n, m_h, m_t, m_s,
    H, T, S, repeats, scale,
    D: tl.constexpr, COLUMNS: tl.constexpr, KEYS_A: tl.constexpr, KEYS_B: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCKS: tl.constexpr,
    MASK: tl.constexpr, LENGTHS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
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
        found = dot(narrow(weights, v.dtype.element_ty, EXACT), v_a, EXACT)
        if KEYS_B:
            weights = tl.exp(scores_b - top[:, None])
            total += tl.sum(weights, 1)
            found += dot(narrow(weights, v.dtype.element_ty, EXACT), v_b, EXACT)
        found = found / tl.where(total == 0, 1.0, total)[:, None]
        rows_o = n * o_n + h * o_h + at_t * o_t
        store_tile(out, found, rows_o, columns, o_d, valid_t, D, EXACT)


def text_attention(
    q_NHTD: Tensor,
    k_MHSD: Tensor,
    v_MHSD: Tensor,
    mask: Tensor | None = None,
    lengths_N: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Cross attention to short text, by the kernel.

    Args:
        q_NHTD, k_MHSD, v_MHSD: at any strides; row n of the batch attends to text n // (N / M). S
            and D as far as :func:`fits` says.
        mask: of bools (True takes part) or to be added, broadcast to (N, H, T, S).
        lengths_N: how many keys of each row of the batch take part, the first ones.
        scale: of the scores; by default D ** -0.5.

    Returns:
        (N, H, T, D), in memory by N, T, H, D. Queries without any key are 0.

    Raises:
        ValueError: naming the argument, what was expected and what was found.
    """
    N, H, T, D = _check(q_NHTD, k_MHSD, v_MHSD, mask, lengths_N)
    M, _, S, _ = k_MHSD.shape
    out = allocate(q_NHTD)
    target = target_of(q_NHTD.device)
    taken = configure(T, S, D, q_NHTD.element_size(), target.gpu.backend)
    strides = [strides_of(x, 4) for x in (q_NHTD, k_MHSD, v_MHSD, out, mask)]
    place = q_NHTD  # of arguments that are not there
    num_blocks = N // M * triton.cdiv(T, taken["BLOCK_T"])
    _text_attention_kernel[(triton.cdiv(num_blocks, taken["BLOCKS"]), M * H)](
        q_NHTD, k_MHSD, v_MHSD, out,
        place if mask is None else mask,
        place if lengths_N is None else lengths_N.contiguous(),
        *(stride for each in strides for stride in each),
        H, T, S, N // M, D**-0.5 if scale is None else scale,
        D=D, MASK=mask_kind(mask), LENGTHS=lengths_N is not None, EXACT=INTERPRETED, **taken,
    )  # fmt: skip
    return out


def fits(S: int, D: int, itemsize: int, target: Target) -> bool:
    """Whether a program can hold S keys and values of D channels on a GPU: where Triton keeps them
    in shared memory, beside a block of queries and their weights; else in registers."""
    rows = sum(split_in_two(S))
    columns = max(next_power_of_2(D), 16)
    if S > MAX_KEYS:
        return False
    if target.gpu.backend == "hip":
        return rows * columns * itemsize <= 128 * 128 * 2
    shared = (2 * rows * columns + MOST_QUERIES * (rows + columns)) * itemsize
    return shared <= target.shared


def configure(T: int, S: int, D: int, itemsize: int, backend: str) -> dict[str, int]:
    """Queries of a block, blocks of a program, tiles of keys, channels, warps."""
    first, second = split_in_two(S)
    block_t = 16 if itemsize == 4 else MOST_QUERIES
    return {
        "COLUMNS": max(next_power_of_2(D), 16),
        "KEYS_A": first,
        "KEYS_B": second,
        "BLOCK_T": min(block_t, max(next_power_of_2(T), 16)),
        "BLOCKS": 8,
        "num_warps": 4 if backend == "hip" else 8,
        "num_stages": 1,
    }


def _check(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lengths_N: Tensor | None
) -> tuple[int, int, int, int]:
    op = "text_attention"
    rows = len(k) if k.dim() == 4 else 0
    is_right = rows > 0 and len(q) % rows == 0
    check(op, "k", f"4 dimensions, rows that divide {len(q)}", tuple(k.shape), is_right)
    check_attention(op, q, k, v, mask, num_dims=(4,), rows_of_k=rows)
    check_lengths(op, q, lengths_N)
    S, D = k.shape[-2:]
    is_right = fits(S, D, k.element_size(), target_of(q.device))
    expected = f"at most {MAX_KEYS} keys, and as many bytes as stay on the chip"
    check(op, "k", expected, f"{S} keys of {D} channels, {k.dtype}", is_right)
    N, H, T, _ = q.shape
    return N, H, T, D


SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? mask=None, Tensor? lengths=None, float? scale=None) "
    "-> Tensor"
)
OP = register(
    "text_attention",
    SCHEMA,
    launch=text_attention,
    reference=text_attention_reference,
    allocate=allocate,
)


def specializations() -> Iterator[Specialization]:
    """What is compiled for the texts of video models: by dtype, keys, head dim and options."""
    for dtype, S, D in product(("bf16", "fp16"), (77, 120, 256, 300, 512), (64, 72, 128)):
        yield from _specialize(dtype, S, D, "", {})
    for S, (name, others) in product((120, 300), OPTIONS.items()):
        yield from _specialize("bf16", S, 72, name, others)
    yield from _specialize("fp32", 120, 64, "", {})


OPTIONS: dict[str, dict[str, int]] = {
    "mask of bools": {"MASK": 1},
    "mask that is added": {"MASK": 2},
    "lengths": {"LENGTHS": True},
}


def _specialize(
    dtype: str, S: int, D: int, label: str, constants: Mapping[str, int]
) -> Iterator[Specialization]:
    """One for each kind of GPU. As Triton does it itself for one call: a stride of 1 is a
    constant."""
    names = _text_attention_kernel.arg_names
    itemsize = 4 if dtype == "fp32" else 2
    strides = {"q_d": 1, "k_d": 1, "v_d": 1, "o_d": 1}
    values = {"D": D, "MASK": 0, "LENGTHS": False, "EXACT": False, **strides, **constants}
    types = dict.fromkeys(names[:4], f"*{dtype}") | {"lengths": "*i64", "scale": "fp32"}
    types |= dict.fromkeys(("H", "T", "S", "repeats"), "i32")
    types["mask"] = type_of_mask(values["MASK"], dtype)
    unaligned = ("mask", "lengths", "m_n", "m_h", "m_t", "m_s")
    title = f"{dtype} S={S} D={D} {label}".strip()
    fitting = [target for target in TARGETS if fits(S, D, itemsize, target)]
    for backend in sorted({target.gpu.backend for target in fitting}):
        taken = configure(1024, S, D, itemsize, backend)
        warps, stages = taken.pop("num_warps"), taken.pop("num_stages")
        constant = values | taken
        yield Specialization(
            title,
            _text_attention_kernel,
            {n: "constexpr" if n in constant else types.get(n, "i64") for n in names},
            constant,
            warps,
            stages,
            tuple(n for n in names[: names.index("H")] if n not in constant and n not in unaligned),
            tuple(target.name for target in fitting if target.gpu.backend == backend),
        )
