"""Copies into another order: the kernel, bit for bit; without a GPU, in the interpreter."""

import itertools

import pytest
import torch

from pabc.kernels import permute_copy as module
from pabc.kernels.permute_copy import BITS, OP, find_tiling, permute_copy, permute_copy_reference

pytestmark = pytest.mark.kernels
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(7,), (2, 3), (4, 5, 6), (3, 1, 4, 2, 5), (2, 3, 2, 3, 2, 4), (100, 70), (1, 1), (0, 3)]
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.bool,
    torch.float8_e4m3fn,
    torch.int64,
    torch.complex64,
)


def make(shape, dtype):
    g = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=g) * 9).to(DEVICE, dtype)


def bits(x):
    return x.view(BITS[x.element_size()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_copy(shape, dtype):
    x = make(shape, dtype)
    views = [x, x[..., ::2], x.expand(3, *shape)[1:]] if x.dim() < 6 else [x]
    for view in views:
        orders = list(itertools.permutations(range(view.dim())))
        for order in orders[:: max(len(orders) // 6, 1)]:
            found, expected = permute_copy(view, order), permute_copy_reference(view, order)
            assert found.is_contiguous() and torch.equal(bits(found), bits(expected)), order


def test_dimensions_are_merged():
    packed = torch.empty(2, 3, 8, 10)
    assert find_tiling(packed.shape, packed.stride()).sizes == (1, 480)
    turned = packed.permute(2, 0, 1, 3)
    assert find_tiling(turned.shape, turned.stride()).sizes == (8, 6, 10)
    matrix = packed.mT
    found = find_tiling(matrix.shape, matrix.stride())
    assert (found.sizes, found.x_steps, found.out_steps) == ((6, 10, 8), (80, 1, 10), (80, 8, 1))


def test_no_more_is_written(monkeypatch):
    x = make((5, 7, 3), torch.float32)
    expected = permute_copy(x, (2, 0, 1))
    buffer = torch.full((x.numel() + 64,), float("nan"), device=DEVICE)
    wanted = x.permute(2, 0, 1)
    monkeypatch.setattr(module, "_allocate", lambda *_: buffer[32:-32].view(wanted.shape))
    assert torch.equal(permute_copy(x, (2, 0, 1)), expected)
    assert buffer[:32].isnan().all() and buffer[-32:].isnan().all()


def test_is_an_op():
    x = make((4, 5, 6), torch.float32)
    torch.library.opcheck(OP, (x, [2, 0, 1]), test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(OP(x, [2, 0, 1]), x.permute(2, 0, 1))


@pytest.mark.parametrize(
    ("x", "order", "message"),
    [
        (torch.ones(2, 3), (0, 0), "order: expected each of 2 dimensions"),
        (torch.ones(2, dtype=torch.complex128), (0,), "x: expected elements of up to 8 bytes"),
        (torch.ones([2] * 7), (6, 5, 4, 3, 2, 1, 0), "x: expected at most 6 dimensions"),
    ],
)
def test_refusals(x, order, message):
    with pytest.raises(ValueError, match=r"^permute_copy\." + message):
        permute_copy(x.to(DEVICE), order)
