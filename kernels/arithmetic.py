"""Products and roundings that give the same on a GPU and in Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, EXACT: tl.constexpr):
    """Returns the matrix product with float32 sums.

    `EXACT` widens the operands first, which changes no term: Triton's interpreter has no product of
    bfloat16.
    """
    if EXACT:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr, EXACT: tl.constexpr):
    """Returns float32 values rounded to the nearest of another dtype.

    `EXACT` rounds to bfloat16 by integer arithmetic: Triton's interpreter truncates.
    """
    if EXACT:  # noqa: SIM102
        if dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


INTERPRETED = type(dot).__name__ == "InterpretedFunction"
"""True if Triton runs kernels in Python, on the CPU (`TRITON_INTERPRET=1`)."""


def next_power_of_2(count: int) -> int:
    """Returns the smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()
