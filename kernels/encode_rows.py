"""Encoding of a cut for its slot: rows as fp8 values over a scale of their own, in one pass.

    C  channels of a row; a scale for each row: its largest magnitude over 448

Bits are those of PyTorch's ops, on every GPU: quotients are rounded as IEEE says, and e4m3 is made
by integers, since not every GPU converts to it.

    a row [1.0, -2.0, 4.0]:  scale 4 / 448, values [112, -224, 448] as e4m3
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .registration import check, register
from .residual_norm import FLOATS, FP8, MAX_CHANNELS, MAX_LEADING, configure
from .rows import load_rows, merge_rows
from .targets import Specialization

FP8_MAX = torch.finfo(FP8).max
OVER_FP8_MAX = 1 / FP8_MAX
TINY = torch.finfo(torch.float32).tiny


def encode_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same by PyTorch's ops."""
    exact = x.float()
    scale = (exact.abs().amax(-1, keepdim=True) * OVER_FP8_MAX).clamp_min(TINY)
    values, scales = _allocate(x)
    return values.copy_((exact / scale).clamp(-FP8_MAX, FP8_MAX)), scales.copy_(scale)


@triton.jit
def _as_e4m3(y):
    """The bits of float32 values of at most 448 as float8_e4m3fn, rounded to the nearest, ties to
    even: by dropping 20 bits; below 2 ** -6, where values are multiples of 2 ** -9, by adding what
    has that as its last bit. NaN is 0x7F."""
    bits = y.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    magnitude = bits.to(tl.float32, bitcast=True)
    small = (magnitude + 16384.0).to(tl.int32, bitcast=True) & 0x7FFFFF
    found = tl.where(magnitude < 0.015625, small, normal)
    return (tl.where(bits > 0x7F800000, 0x7F, found) | sign).to(tl.uint8)


@triton.jit
def _encode_rows_kernel(
    x, values, scales, x_i, x_j, x_k, x_c, v_i, v_j, v_k, v_c, s_i, s_j, s_k, s_c,
    num_rows, J, K, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of (I, J, K) of them."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS).to(tl.int64)
    is_row = row < num_rows
    valid = is_row[:, None] & (columns < C)[None, :]
    i, j, k = (row // K // J).to(tl.int64), (row // K % J).to(tl.int64), (row % K).to(tl.int64)
    found = load_rows(x, i, j, k, x_i, x_j, x_k, x_c, columns, valid).to(tl.float32)
    largest = tl.max(tl.abs(found), 1)
    scale = tl.maximum(largest * OVER_448, TINY_SCALE)
    is_nan = tl.max((found != found).to(tl.int32), 1) != 0
    scale = tl.where(is_nan, float("nan"), scale)
    quotient = tl.div_rn(found, tl.broadcast_to(scale[:, None], found.shape))
    inside = tl.minimum(tl.maximum(quotient, -448.0), 448.0)
    inside = tl.where(quotient == quotient, inside, quotient)
    at = (i * v_i + j * v_j + k * v_k)[:, None] + (columns * v_c)[None, :]
    tl.store(values + at, _as_e4m3(inside), mask=valid)
    tl.store(scales + i * s_i + j * s_j + k * s_k, scale, mask=is_row)


TINY_SCALE = tl.constexpr(TINY)
OVER_448 = tl.constexpr(OVER_FP8_MAX)


def encode_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows over their scales, by the kernel.

    Args:
        x: (..., C) at any strides; float32, bfloat16 or float16.

    Returns:
        values (..., C) as float8_e4m3fn, in memory as `torch.empty_like(x)` is, and scales (..., 1)
        as float32, contiguous. What is not finite in a row is not finite in its scale or values.

    Raises:
        ValueError: naming the argument, what was expected and what was found.
    """
    _need("a dimension or more", x.dim(), x.dim() > 0)
    _need(f"one of {FLOATS}", x.dtype, x.dtype in FLOATS)
    C = x.shape[-1]
    _need(f"up to {MAX_CHANNELS} channels", C, 1 <= C <= MAX_CHANNELS)
    values, scales = _allocate(x)
    sizes, strides = merge_rows(x.shape, [x, values, scales])
    _need(f"at most {MAX_LEADING} dimensions of rows", sizes, len(sizes) <= MAX_LEADING)
    missing = MAX_LEADING - len(sizes)
    _, J, K = [1] * missing + sizes
    num_rows = x.numel() // C
    taken = configure(C)
    if num_rows:
        _encode_rows_kernel[(triton.cdiv(num_rows, taken["ROWS"]),)](
            x, values.view(torch.uint8), scales,
            *(step for steps in strides for step in (0,) * missing + steps),
            num_rows, J, K, C=C, **taken,
        )  # fmt: skip
    return values, scales


def _need(expected: str, found: object, is_right: bool) -> None:
    check("encode_rows", "x", expected, found, is_right)


def _allocate(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=FP8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


OP = register(
    "encode_rows",
    "(Tensor x) -> (Tensor, Tensor)",
    launch=encode_rows,
    reference=encode_rows_reference,
    allocate=_allocate,
)


def specializations() -> Iterator[Specialization]:
    """What is compiled for the widths of video models, as rows lie in them, and apart."""
    for dtype in ("fp32", "bf16", "fp16"):
        for C in (1152, 1920, 3072, 5120):
            yield _specialize(dtype, C, is_apart=False)
    yield _specialize("bf16", 1152, is_apart=True)


def _specialize(dtype: str, C: int, *, is_apart: bool) -> Specialization:
    names = _encode_rows_kernel.arg_names
    taken = configure(C)
    warps = taken.pop("num_warps")
    values = {"C": C, **taken} | ({} if is_apart else {"x_c": 1, "v_c": 1})
    types = {"x": f"*{dtype}", "values": "*u8", "scales": "*fp32"}
    types |= dict.fromkeys(("num_rows", "J", "K"), "i32")
    signature = {n: "constexpr" if n in values else types.get(n, "i64") for n in names}
    steps = ("x_i", "x_j", "x_k", "v_i", "v_j", "v_k")
    aligned = ("x", "values", "scales", *(() if is_apart else steps))
    title = f"{dtype} C={C}{' apart' * is_apart}"
    return Specialization(title, _encode_rows_kernel, signature, values, warps, aligned=aligned)
