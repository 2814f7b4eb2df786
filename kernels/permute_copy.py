"""Copies with dimensions in another order: the layout change around a collective, in one pass.

One program copies a tile of two dimensions: the one contiguous in the source and the one contiguous
in the result. Where these are the same, tiles are whole rows. Neighboring dimensions that both
sides step through evenly are merged.

    x (2, 3) = [[a b c], [d e f]], order (1, 0):  [a d b e c f] in memory
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import next_power_of_2
from .registration import Constraint, KernelSignature, TensorSpec

MAX_DIMS = 6
"""Dimensions that the kernel steps through, after merging."""
TILE = 4096
"""Bytes that one program copies."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The dtype that elements are copied as, by their size in bytes."""


class PermuteCopyArguments(NamedTuple):
    """The arguments of :func:`permute_copy`.

    Attributes:
        x: a tensor of any dtype of up to 8 bytes, at any strides.
        order: the dimension of `x` that each dimension of the result is.
    """

    x: Annotated[Tensor, TensorSpec("(...)")]
    order: Sequence[int]

    def constraints(self) -> Iterator[Constraint]:
        """Yields the order of dimensions and the size of elements."""
        dims, itemsize = list(range(self.x.dim())), self.x.element_size()
        yield "order", f"each of {len(dims)} dimensions", self.order, sorted(self.order) == dims
        yield "x", "elements of up to 8 bytes", self.x.dtype, itemsize in BITS


SIGNATURE = KernelSignature("permute_copy", PermuteCopyArguments)


@SIGNATURE.checked
def permute_copy_reference(given: PermuteCopyArguments) -> Tensor:
    """Computes the same with PyTorch's ops."""
    x, order = given
    return x.permute(*order).contiguous() if x.dim() else x.clone()


@triton.jit
def permute_copy_kernel(
    x, out, n_0, n_1, n_2, n_3, x_0, x_1, x_2, x_3, o_0, o_1, o_2, o_3,
    A, B, x_a, x_b, o_a, o_b, tiles_a, tiles_b,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Copies a tile of dimensions a and b, at one place of the four others."""
    tile = tl.program_id(0).to(tl.int64)
    b = tile % tiles_b * BLOCK_B + tl.arange(0, BLOCK_B)
    a = tile // tiles_b % tiles_a * BLOCK_A + tl.arange(0, BLOCK_A)
    place = tile // tiles_b // tiles_a
    at_3, place = place % n_3, place // n_3
    at_2, place = place % n_2, place // n_2
    at_1, at_0 = place % n_1, place // n_1
    x += at_0 * x_0 + at_1 * x_1 + at_2 * x_2 + at_3 * x_3
    out += at_0 * o_0 + at_1 * o_1 + at_2 * o_2 + at_3 * o_3
    valid = (a < A)[:, None] & (b < B)[None, :]
    a, b = a[:, None], b[None, :]
    elements = tl.load(x + a * x_a + b * x_b, mask=valid, other=0)
    tl.store(out + a * o_a + b * o_b, elements, mask=valid)


@dataclass(frozen=True, slots=True)
class Tiling:
    """The dimensions of a copy, those of a tile last.

    Attributes:
        sizes: of each dimension.
        x_steps, out_steps: strides of the source and of the result in each dimension.
    """

    sizes: tuple[int, ...]
    x_steps: tuple[int, ...]
    out_steps: tuple[int, ...]

    @property
    def is_turned(self) -> bool:
        """True if source and result are not contiguous in the same dimension."""
        return self.x_steps[-1] != 1


def find_tiling(shape: Sequence[int], strides: Sequence[int]) -> Tiling:
    """Returns the tiling, of two dimensions or more, of a copy to contiguous memory.

    # transposed: rows of 10 are read, of 8 are written     # found
    shape (2, 3, 10, 8), strides (240, 80, 1, 10)           sizes (6, 10, 8)
                                                            x_steps (80, 1, 10)
                                                            out_steps (80, 8, 1)
    """
    dims: list[tuple[int, int]] = []  # size, step of x
    for size, step in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == step * size:
            dims[-1] = (dims[-1][0] * size, step)
        else:
            dims.append((size, step))
    dims = [(1, 0)] * (2 - len(dims)) + dims
    steps = [math.prod(size for size, _ in dims[d + 1 :]) for d in range(len(dims))]
    order = list(range(len(dims)))
    if dims[-1][1] != 1:  # the tile's other dimension: the one with the smallest stride of x
        order.insert(-1, order.pop(min(order[:-1], key=lambda d: dims[d][1])))
    return Tiling(
        tuple(dims[d][0] for d in order),
        tuple(dims[d][1] for d in order),
        tuple(steps[d] for d in order),
    )


@SIGNATURE.checked
def permute_copy(given: PermuteCopyArguments) -> Tensor:
    """Returns `x.permute(order)`, contiguous, copied by the kernel.

    Raises:
        ValueError: if an argument is not as :class:`PermuteCopyArguments` states, or if more than
            :data:`MAX_DIMS` dimensions are left after merging.
    """
    x, order = given
    wanted, out = x.permute(*order), _allocate(given)
    tiling = find_tiling(wanted.shape, wanted.stride())
    missing = MAX_DIMS - len(tiling.sizes)
    if missing < 0:
        SIGNATURE.refuse("x", f"at most {MAX_DIMS} dimensions", tiling.sizes)
    if not out.numel():
        return out
    sizes, x_steps, out_steps = (
        (fill,) * missing + steps
        for fill, steps in ((1, tiling.sizes), (0, tiling.x_steps), (0, tiling.out_steps))
    )
    A, B = sizes[-2:]
    config = configure(A, B, x.element_size(), is_turned=tiling.is_turned)
    tiles = triton.cdiv(A, config["BLOCK_A"]), triton.cdiv(B, config["BLOCK_B"])
    bits = BITS[x.element_size()]
    permute_copy_kernel[(math.prod(sizes[:-2]) * math.prod(tiles),)](
        x.view(bits), out.view(bits), *sizes[:-2], *x_steps[:-2], *out_steps[:-2],
        A, B, *x_steps[-2:], *out_steps[-2:], *tiles, **config,
    )  # fmt: skip
    return out


def configure(A: int, B: int, itemsize: int, *, is_turned: bool) -> dict[str, int]:
    """Returns the sides of a tile, powers of two: square if turned, else as wide as a row."""
    most = TILE // itemsize
    side = 1 << (most.bit_length() // 2)
    block_b = min(next_power_of_2(B), side if is_turned else most)
    block_a = min(next_power_of_2(A), most // block_b)
    return {"BLOCK_A": block_a, "BLOCK_B": block_b, "num_warps": 4}


def _allocate(given: PermuteCopyArguments) -> Tensor:
    x, order = given
    return x.new_empty([x.shape[d] for d in order])


OP = SIGNATURE.register(launch=permute_copy, reference=permute_copy_reference, allocate=_allocate)
