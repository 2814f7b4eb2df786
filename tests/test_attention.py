"""Attention of any length: the kernel against float64; without a GPU, in the interpreter."""

import pytest
import torch
from attentions import DEVICE, check_kernel, check_writes, make

from pabc.kernels import attention as module
from pabc.kernels.attention import OP, attention, attention_reference
from pabc.kernels.attention_parts import split_in_two

pytestmark = pytest.mark.kernels
SHAPES = [  # N, H, T, S, D
    (2, 2, 33, 70, 72),
    (1, 2, 130, 65, 64),
    (2, 1, 1, 1, 8),
    (1, 3, 17, 200, 40),
    (2, 1, 16, 64, 96),
    (1, 2, 5, 129, 128),
]


@pytest.mark.parametrize("what", ["", "bool", "keys", "added", "lengths", "bool lengths"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(shape, what):
    check_kernel(attention, attention_reference, shape, what)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_element_is_written_and_no_more(shape, monkeypatch):
    check_writes(attention, module, shape, monkeypatch)


def test_masks_of_the_lowest_numbers_are_no_masks_of_minus_infinity():
    q, k, v = make((1, 1, 3, 100, 16), torch.float32)
    mask = torch.zeros(1, 1, 3, 100, device=DEVICE)
    mask[..., 0, :] = torch.finfo(torch.float32).min
    mask[..., 1, :] = float("-inf")
    found = attention(q, k, v, mask)
    torch.testing.assert_close(found[0, 0, 0], v[0, 0].mean(0), atol=1e-5, rtol=1e-5)
    assert (found[0, 0, 1] == 0).all()


def test_large_scores():
    q, k, v = make((1, 1, 20, 150, 16), torch.float32)
    torch.testing.assert_close(
        attention(100 * q, 100 * k, v), attention_reference(100 * q, 100 * k, v)
    )


def test_channels_are_not_padded_to_a_power_of_two():
    assert {D: split_in_two(D) for D in (8, 64, 72, 80, 96, 100, 128)} == {
        8: (16, 0),
        64: (64, 0),
        72: (64, 16),
        80: (64, 16),
        96: (64, 32),
        100: (128, 0),
        128: (128, 0),
    }


def test_is_an_op():
    inputs = make(SHAPES[0], torch.float32)
    torch.library.opcheck(OP, (*inputs,))
    assert torch.equal(OP(*inputs), attention(*inputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (1, 4, 8)}, r"q: expected shape \(N, H, T, D\), found \(1, 4, 8\)"),
        (
            {"q": (1, 1, 4, 130), "k": (1, 1, 4, 130), "v": (1, 1, 4, 130)},
            "q: expected a head dim of 1 to 128, found 130",
        ),
        ({"k": (1, 2, 4, 8)}, r"k: expected shape \(1, 1, S, 8\), found \(1, 2, 4, 8\)"),
        ({"v": (1, 1, 5, 8)}, r"v: expected shape \(1, 1, 4, 8\), found \(1, 1, 5, 8\)"),
        (
            {"mask": (2, 1, 4, 4)},
            r"mask: expected a shape that broadcasts to \(1, 1, 4, 4\), found",
        ),
        (
            {"lengths": (1,)},
            "lengths: expected dtype torch.int32 or torch.int64, found torch.float32",
        ),
    ],
)
def test_refusals(change, message):
    shapes = {"q": (1, 1, 4, 8), "k": (1, 1, 4, 8), "v": (1, 1, 4, 8)} | change
    found = {name: torch.ones(shape, device=DEVICE) for name, shape in shapes.items()}
    inputs = [found.pop(name) for name in "qkv"]
    with pytest.raises(ValueError, match=r"^attention\." + message):
        attention(*inputs, found.get("mask"), found.get("lengths"))
