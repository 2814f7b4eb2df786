"""Loads rows of queries or keys and applies an RMS norm and a rotary embedding to them.

T  rows; D  channels; HALF  pairs of channels, padded to a power of two

a row [1, 2, 3, 4], halves: tiles a = [1, 2], b = [3, 4]; neighbors: a = [1, 3], b = [2, 4]
the embedding turns both:   [a * cos - b * sin, b * cos + a * sin]
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import narrow


@triton.jit
def _load_pairs(
    base, rows_T, stride_d, valid_T, D: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr
):  # fmt: skip
    """Returns rows as two float32 tiles: the first channels of the pairs, and the second ones."""
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
def load_turned(
    base, rows_T, stride_d, valid_T, weight, cos, sin, position_T,
    D: tl.constexpr, HALF: tl.constexpr, eps, NORM: tl.constexpr, PAIRS: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Returns rows of q or k after the norm and the rotary embedding.

    The two channels of a pair are next to each other, whatever `PAIRS` is: scores do not depend on
    the order of channels.
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
    # Padding is 0 already. Without this, Triton first moves what was loaded into the layout of the
    # product, in which elements are held several times, and then computes on each copy.
    turned = tl.where((tl.arange(0, 2 * HALF) < D)[None, :], turned, 0.0)
    return narrow(turned, dtype, EXACT)


@triton.jit
def load_normed(
    base, rows_T, columns_D, stride_d, valid_TD, weight,
    D: tl.constexpr, eps, NORM: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Returns rows of q or k after the norm, if there is one."""
    x = tl.load(base + rows_T[:, None] + (columns_D * stride_d)[None, :], mask=valid_TD, other=0.0)
    if NORM:
        y = x.to(tl.float32)
        gain = tl.load(weight + columns_D, mask=columns_D < D, other=0.0).to(tl.float32)
        y = y * tl.rsqrt(tl.sum(y * y, 1)[:, None] / D + eps) * gain[None, :]
        x = narrow(y, x.dtype, EXACT)
    return x
