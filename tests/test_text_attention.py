"""Cross attention to short text: the kernel against float64; without a GPU, in the interpreter."""

import pytest
import torch
from attentions import DEVICE, check_kernel, check_writes, make, make_lengths, make_mask

from pabc.kernels import text_attention as module
from pabc.kernels.gpus import TARGETS
from pabc.kernels.text_attention import OP, fits, text_attention, text_attention_reference

pytestmark = pytest.mark.kernels
SHAPES = [  # N, H, T, S, D
    (2, 2, 70, 33, 24),
    (1, 3, 33, 120, 72),
    (2, 1, 1, 1, 8),
    (1, 1, 40, 300, 16),
]


@pytest.mark.parametrize("what", ["", "bool", "keys", "added", "lengths", "bool lengths"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(shape, what):
    check_kernel(text_attention, text_attention_reference, shape, what)


@pytest.mark.parametrize("what", ["", "keys", "lengths"])
@pytest.mark.parametrize(("repeats", "T"), [(3, 17), (12, 40)])
def test_frames_share_a_text(repeats, T, what):
    shape = (2 * repeats, 2, T, 19, 24)
    q, _, _ = make(shape, torch.float32)
    _, k, v = make((2, 2, T, 19, 24), torch.float32, seed=3)
    options = make_mask(shape, torch.float32, what), make_lengths(shape, what)
    each = (x.repeat_interleave(repeats, 0) for x in (k, v))
    expected = text_attention(q, *each, *options)
    assert torch.equal(text_attention(q, k, v, *options), expected)
    torch.testing.assert_close(text_attention_reference(q, k, v, *options), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_element_is_written_and_no_more(shape, monkeypatch):
    check_writes(text_attention, module, shape, monkeypatch)


def test_what_stays_on_a_chip():
    names = {
        (S, D): [target.name for target in TARGETS if fits(S, D, 2, target)]
        for S, D in [(120, 72), (300, 72), (512, 64), (512, 128), (513, 16)]
    }
    assert names == {
        (120, 72): ["sm_80", "sm_90", "sm_100", "gfx942"],
        (300, 72): ["sm_90", "sm_100"],
        (512, 64): ["sm_90", "sm_100"],
        (512, 128): [],
        (513, 16): [],
    }


def test_is_an_op():
    inputs = make(SHAPES[0], torch.float32)
    torch.library.opcheck(OP, (*inputs,))
    assert torch.equal(OP(*inputs), text_attention(*inputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"k": (2, 1, 4, 8), "v": (2, 1, 4, 8)},
            r"k: expected a number of texts that divides 3, found 2",
        ),
        ({"k": (1, 1, 4, 8)}, r"v: expected shape \(1, 1, 4, 8\), found \(3, 1, 4, 8\)"),
        ({"k": (3, 1, 600, 8), "v": (3, 1, 600, 8)}, "k: expected at most 512 keys.* found 600"),
        (
            {"lengths": (1,)},
            "lengths: expected dtype torch.int32 or torch.int64, found torch.float32",
        ),
    ],
)
def test_refusals(change, message):
    shapes = {"q": (3, 1, 4, 8), "k": (3, 1, 4, 8), "v": (3, 1, 4, 8)} | change
    found = {name: torch.ones(shape, device=DEVICE) for name, shape in shapes.items()}
    inputs = [found.pop(name) for name in "qkv"]
    with pytest.raises(ValueError, match=r"^text_attention\." + message):
        text_attention(*inputs, None, found.get("lengths"))
