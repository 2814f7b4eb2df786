"""What kernels compute with, on a GPU and in Triton's interpreter alike."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, EXACT: tl.constexpr):
    """The product with float32 sums. `EXACT`: of operands made float32, which changes none of its
    terms: Triton's interpreter knows no product of bfloat16."""
    if EXACT:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr, EXACT: tl.constexpr):
    """float32 as another dtype, to the nearest. `EXACT`: by hand for bfloat16, of which Triton's
    interpreter drops the last bits instead."""
    if EXACT:  # noqa: SIM102
        if dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


INTERPRETED = type(dot).__name__ == "InterpretedFunction"
"""Whether Triton runs kernels in Python, on the CPU (`TRITON_INTERPRET=1`)."""


def next_power_of_2(count: int) -> int:
    """The least power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()
