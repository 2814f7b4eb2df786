"""Copies of what lies in another order: the layout change around a collective, in one pass.

    P  parts, one for each rank; the dimensions of x in any order

One program copies a tile of two dimensions: the one that is read side by side, and the one that is
written so; where they are the same, whole rows. Dimensions that are stepped through evenly by both
are one.

    x (2, 3) = [[a b c], [d e f]], order (1, 0):  [a d b e c f] in memory
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import next_power_of_2
from .registration import check, register
from .targets import Specialization

MAX_DIMS = 6
"""After those are merged that both sides step through evenly."""
TILE = 4096
"""Bytes that one program copies."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def permute_copy_reference(x: Tensor, order: Sequence[int]) -> Tensor:
    """The same by PyTorch's ops."""
    return x.permute(*order).contiguous() if x.dim() else x.clone()


@triton.jit
def _permute_copy_kernel(
    x, out, n_0, n_1, n_2, n_3, x_0, x_1, x_2, x_3, o_0, o_1, o_2, o_3,
    A, B, x_a, x_b, o_a, o_b, tiles_a, tiles_b,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """A tile of dimensions a and b, at one place of the four others."""
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
    found = tl.load(x + a * x_a + b * x_b, mask=valid, other=0)
    tl.store(out + a * o_a + b * o_b, found, mask=valid)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a copy is cut: sizes, steps of x and steps of the result, of each dimension, the last two
    of which are those of a tile."""

    sizes: tuple[int, ...]
    x_steps: tuple[int, ...]
    out_steps: tuple[int, ...]

    @property
    def is_turned(self) -> bool:
        """Whether what is read side by side is not what is written so."""
        return self.x_steps[-1] != 1


def plan(shape: Sequence[int], strides: Sequence[int]) -> Plan:
    """Of a copy of what has these strides to contiguous memory; at least two dimensions."""
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
    if dims[-1][1] != 1:  # the tile's other dimension: the one that x steps through least
        order.insert(-1, order.pop(min(order[:-1], key=lambda d: dims[d][1])))
    return Plan(
        tuple(dims[d][0] for d in order),
        tuple(dims[d][1] for d in order),
        tuple(steps[d] for d in order),
    )


def permute_copy(x: Tensor, order: Sequence[int]) -> Tensor:
    """`x.permute(order)`, contiguous, by the kernel.

    Args:
        x: of any dtype of up to 8 bytes, at any strides; at most :data:`MAX_DIMS` dimensions that
            are not merged.
        order: of its dimensions, each of them once.

    Raises:
        ValueError: naming the argument, what was expected and what was found.
    """
    check("permute_copy", "order", f"each of {x.dim()} dimensions", order, _is_order(x, order))
    check("permute_copy", "x", "elements of up to 8 bytes", x.dtype, x.element_size() in BITS)
    wanted, out = x.permute(*order), _allocate(x, order)
    found = plan(wanted.shape, wanted.stride())
    expected = f"at most {MAX_DIMS} dimensions"
    check("permute_copy", "x", expected, found.sizes, len(found.sizes) <= MAX_DIMS)
    if not out.numel():
        return out
    missing = MAX_DIMS - len(found.sizes)
    sizes, x_steps, out_steps = (
        (fill,) * missing + steps
        for fill, steps in ((1, found.sizes), (0, found.x_steps), (0, found.out_steps))
    )
    A, B = sizes[-2:]
    taken = configure(A, B, x.element_size(), is_turned=found.is_turned)
    tiles = triton.cdiv(A, taken["BLOCK_A"]), triton.cdiv(B, taken["BLOCK_B"])
    bits = BITS[x.element_size()]
    _permute_copy_kernel[(math.prod(sizes[:-2]) * math.prod(tiles),)](
        _as_bits(x, bits), _as_bits(out, bits), *sizes[:-2], *x_steps[:-2], *out_steps[:-2],
        A, B, *x_steps[-2:], *out_steps[-2:], *tiles, **taken,
    )  # fmt: skip
    return out


def configure(A: int, B: int, itemsize: int, *, is_turned: bool) -> dict[str, int]:
    """The sides of a tile, of powers of two: square where it is turned, else as wide as a row."""
    most = TILE // itemsize
    side = 1 << (most.bit_length() // 2)
    block_b = min(next_power_of_2(B), side if is_turned else most)
    block_a = min(next_power_of_2(A), most // block_b)
    return {"BLOCK_A": block_a, "BLOCK_B": block_b, "num_warps": 4}


def _is_order(x: Tensor, order: Sequence[int]) -> bool:
    return sorted(order) == list(range(x.dim()))


def _as_bits(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.view(dtype)


def _allocate(x: Tensor, order: Sequence[int]) -> Tensor:
    return x.new_empty([x.shape[d] for d in order])


OP = register(
    "permute_copy",
    "(Tensor x, int[] order) -> Tensor",
    launch=permute_copy,
    reference=permute_copy_reference,
    allocate=_allocate,
)


def specializations() -> Iterator[Specialization]:
    """What is compiled, by the size of elements: for rows, and for what is turned."""
    for itemsize, is_turned in (
        (1, False),
        (2, False),
        (4, False),
        (1, True),
        (2, True),
        (4, True),
    ):
        names = _permute_copy_kernel.arg_names
        taken = configure(1024, 1152, itemsize, is_turned=is_turned)
        warps = taken.pop("num_warps")
        values = {**taken, "o_b": 1, ("x_a" if is_turned else "x_b"): 1}
        kind = {1: "*u8", 2: "*i16", 4: "*i32"}[itemsize]
        types = dict.fromkeys(("x", "out"), kind)
        types |= dict.fromkeys(("A", "B", "tiles_a", "tiles_b"), "i32")
        signature = {n: "constexpr" if n in values else types.get(n, "i64") for n in names}
        aligned = tuple(n for n in names if n not in values and n not in ("tiles_a", "tiles_b"))
        title = f"{8 * itemsize} bits, {'turned' if is_turned else 'rows'}"
        yield Specialization(title, _permute_copy_kernel, signature, values, warps, 2, aligned)
