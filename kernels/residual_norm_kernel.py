"""The Triton kernel of :mod:`pabc.kernels.residual_norm`, which explains it."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import decode_e4m3, load_rows, store_rows


@triton.jit
def _load_term(
    cut, cut_scale, gate, factor, i, j, k, columns, valid, is_row,
    c_i, c_j, c_k, c_c, s_i, s_j, s_k, g_i, g_j, g_k, g_c,
    FORM: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Returns factor * gate * cut in float32; FORM is 1 for a float cut, 2 for one in fp8."""
    term = load_rows(cut, i, j, k, c_i, c_j, c_k, c_c, columns, valid)
    if FORM == 2:
        by = tl.load(cut_scale + i * s_i + j * s_j + k * s_k, mask=is_row, other=0.0)
        term = decode_e4m3(term) * by.to(tl.float32)[:, None]
    else:
        term = term.to(tl.float32)
    if GATED:
        term *= load_rows(gate, i, j, k, g_i, g_j, g_k, g_c, columns, valid).to(tl.float32)
    return term * factor


@triton.jit
def residual_norm_kernel(
    x, cut0, cut1, cut2, cut_scale0, cut_scale1, cut_scale2, gate0, gate1, gate2,
    scale, shift, y, n, weight, bias,
    x_i, x_j, x_k, x_c, cut0_i, cut0_j, cut0_k, cut0_c, cut1_i, cut1_j, cut1_k, cut1_c,
    cut2_i, cut2_j, cut2_k, cut2_c, cut_scale0_i, cut_scale0_j, cut_scale0_k, cut_scale0_c,
    cut_scale1_i, cut_scale1_j, cut_scale1_k, cut_scale1_c,
    cut_scale2_i, cut_scale2_j, cut_scale2_k, cut_scale2_c, gate0_i, gate0_j, gate0_k, gate0_c,
    gate1_i, gate1_j, gate1_k, gate1_c, gate2_i, gate2_j, gate2_k, gate2_c,
    scale_i, scale_j, scale_k, scale_c, shift_i, shift_j, shift_k, shift_c, y_i, y_j, y_k, y_c,
    n_i, n_j, n_k, n_c,
    factor0, factor1, factor2, offset, eps, num_rows, J, K,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    FORM0: tl.constexpr, FORM1: tl.constexpr, FORM2: tl.constexpr,
    GATED0: tl.constexpr, GATED1: tl.constexpr, GATED2: tl.constexpr,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, WRITE_Y: tl.constexpr, WRITE_N: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Computes ROWS of the rows (I, J, K)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    is_row, is_column = row < num_rows, columns < C
    valid = is_row[:, None] & is_column[None, :]
    i, j, k = row // K // J, row // K % J, row % K
    i, j, k, columns = i.to(tl.int64), j.to(tl.int64), k.to(tl.int64), columns.to(tl.int64)

    total = load_rows(x, i, j, k, x_i, x_j, x_k, x_c, columns, valid).to(tl.float32)
    if FORM0 != 0:
        total += _load_term(
            cut0, cut_scale0, gate0, factor0, i, j, k, columns, valid, is_row,
            cut0_i, cut0_j, cut0_k, cut0_c, cut_scale0_i, cut_scale0_j, cut_scale0_k,
            gate0_i, gate0_j, gate0_k, gate0_c, FORM0, GATED0,
        )  # fmt: skip
    if FORM1 != 0:
        total += _load_term(
            cut1, cut_scale1, gate1, factor1, i, j, k, columns, valid, is_row,
            cut1_i, cut1_j, cut1_k, cut1_c, cut_scale1_i, cut_scale1_j, cut_scale1_k,
            gate1_i, gate1_j, gate1_k, gate1_c, FORM1, GATED1,
        )  # fmt: skip
    if FORM2 != 0:
        total += _load_term(
            cut2, cut_scale2, gate2, factor2, i, j, k, columns, valid, is_row,
            cut2_i, cut2_j, cut2_k, cut2_c, cut_scale2_i, cut_scale2_j, cut_scale2_k,
            gate2_i, gate2_j, gate2_k, gate2_c, FORM2, GATED2,
        )  # fmt: skip
    # Operands of what follows the norm are loaded before it, so that these loads overlap its sums.
    if WEIGHT:
        by_weight = tl.load(weight + columns, mask=is_column, other=0.0)
    if BIAS:
        by_bias = tl.load(bias + columns, mask=is_column, other=0.0)
    if SCALE:
        by_scale = load_rows(scale, i, j, k, scale_i, scale_j, scale_k, scale_c, columns, valid)
    if SHIFT:
        by_shift = load_rows(shift, i, j, k, shift_i, shift_j, shift_k, shift_c, columns, valid)
    if WRITE_Y:
        store_rows(y, total, i, j, k, y_i, y_j, y_k, y_c, columns, valid, EXACT)
    if NORM == 1:
        total -= tl.sum(total, 1)[:, None] / C
        total = tl.where(valid, total, 0.0)
    if NORM != 0:
        total *= tl.rsqrt(tl.sum(total * total, 1)[:, None] / C + eps)
    if WEIGHT:
        total *= by_weight.to(tl.float32)[None, :]
    if BIAS:
        total += by_bias.to(tl.float32)[None, :]
    if SCALE:
        total *= offset + by_scale.to(tl.float32)
    if SHIFT:
        total += by_shift.to(tl.float32)
    if WRITE_N:
        store_rows(n, total, i, j, k, n_i, n_j, n_k, n_c, columns, valid, EXACT)
