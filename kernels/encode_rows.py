"""Encoding of a cut for its slot: fp8 values, and one scale for each row, in one pass.

    C  channels of a row; the scale of a row is its largest magnitude over 448

The bits are those of PyTorch's ops on every GPU: quotients are rounded as IEEE says, and e4m3 is
made by integer arithmetic, since not every GPU converts to it.

    a row [1.0, -2.0, 4.0]:  scale 4 / 448, values [112, -224, 448] as e4m3
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dtypes import FLOATS, FP8, FP8_MAX, OVER_FP8_MAX, TINY
from .registration import Constraint, KernelSignature, TensorSpec
from .rows import MAX_CHANNELS, MAX_ROW_DIMS, configure_rows, load_rows, merge_rows, pad_rows


class EncodeRowsArguments(NamedTuple):
    """The arguments of :func:`encode_rows`.

    Attributes:
        x: rows at any strides.
    """

    x: Annotated[Tensor, TensorSpec("(..., C)", dtypes=FLOATS)]

    def constraints(self) -> Iterator[Constraint]:
        """Yields the number of channels."""
        C = self.x.shape[-1]
        yield "x", f"1 to {MAX_CHANNELS} channels", C, 1 <= C <= MAX_CHANNELS


SIGNATURE = KernelSignature("encode_rows", EncodeRowsArguments)


@SIGNATURE.checked
def encode_rows_reference(given: EncodeRowsArguments) -> tuple[Tensor, Tensor]:
    """Computes the same with PyTorch's ops."""
    exact = given.x.float()
    scale = (exact.abs().amax(-1, keepdim=True) * OVER_FP8_MAX).clamp_min(TINY)
    values, scales = _allocate(given)
    return values.copy_((exact / scale).clamp(-FP8_MAX, FP8_MAX)), scales.copy_(scale)


@triton.jit
def _as_e4m3(y):
    """Returns the bits of float32 values of at most 448 as float8_e4m3fn, ties rounded to even.

    Normal values drop 20 bits. Below 2 ** -6 values are multiples of 2 ** -9: adding 2 ** 14, whose
    last bit is 2 ** -9, rounds to these. NaN is 0x7F.
    """
    bits = y.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    magnitude = bits.to(tl.float32, bitcast=True)
    small = (magnitude + 16384.0).to(tl.int32, bitcast=True) & 0x7FFFFF
    encoded = tl.where(magnitude < 0.015625, small, normal)
    return (tl.where(bits > 0x7F800000, 0x7F, encoded) | sign).to(tl.uint8)


TINY_SCALE = tl.constexpr(TINY)
OVER_448 = tl.constexpr(OVER_FP8_MAX)


@triton.jit
def encode_rows_kernel(
    x, values, scales, x_i, x_j, x_k, x_c, v_i, v_j, v_k, v_c, s_i, s_j, s_k, s_c,
    num_rows, J, K, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Encodes ROWS of the rows (I, J, K)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS).to(tl.int64)
    is_row = row < num_rows
    valid = is_row[:, None] & (columns < C)[None, :]
    i, j, k = (row // K // J).to(tl.int64), (row // K % J).to(tl.int64), (row % K).to(tl.int64)
    exact = load_rows(x, i, j, k, x_i, x_j, x_k, x_c, columns, valid).to(tl.float32)
    largest = tl.max(tl.abs(exact), 1)
    scale = tl.maximum(largest * OVER_448, TINY_SCALE)
    is_nan = tl.max((exact != exact).to(tl.int32), 1) != 0
    scale = tl.where(is_nan, float("nan"), scale)
    quotient = tl.div_rn(exact, tl.broadcast_to(scale[:, None], exact.shape))
    inside = tl.minimum(tl.maximum(quotient, -448.0), 448.0)
    inside = tl.where(quotient == quotient, inside, quotient)
    at = (i * v_i + j * v_j + k * v_k)[:, None] + (columns * v_c)[None, :]
    tl.store(values + at, _as_e4m3(inside), mask=valid)
    tl.store(scales + i * s_i + j * s_j + k * s_k, scale, mask=is_row)


@SIGNATURE.checked
def encode_rows(given: EncodeRowsArguments) -> tuple[Tensor, Tensor]:
    """Encodes rows with the kernel.

    Returns:
        values (..., C) in float8_e4m3fn, laid out as `torch.empty_like(x)`, and scales (..., 1) in
        float32, contiguous. What is not finite in a row is not finite in its scale or values.

    Raises:
        ValueError: if an argument is not as :class:`EncodeRowsArguments` states, or if its rows
            have more than :data:`~pabc.kernels.rows.MAX_ROW_DIMS` dimensions after merging.
    """
    x = given.x
    values, scales = _allocate(given)
    sizes, strides = merge_rows(x.shape, [x, values, scales])
    if len(sizes) > MAX_ROW_DIMS:
        SIGNATURE.refuse("x", f"at most {MAX_ROW_DIMS} dimensions of rows", sizes)
    (_, J, K), steps = pad_rows(sizes, strides)
    C = x.shape[-1]
    num_rows = x.numel() // C
    config = configure_rows(C)
    if num_rows:
        encode_rows_kernel[(triton.cdiv(num_rows, config["ROWS"]),)](
            x, values.view(torch.uint8), scales, *steps, num_rows, J, K, C=C, **config
        )
    return values, scales


def _allocate(given: EncodeRowsArguments) -> tuple[Tensor, Tensor]:
    x = given.x
    return torch.empty_like(x, dtype=FP8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


OP = SIGNATURE.register(launch=encode_rows, reference=encode_rows_reference, allocate=_allocate)
