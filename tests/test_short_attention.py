"""Attention of short sequences: the kernel against float64; without a GPU, in the interpreter."""

import itertools

import attentions
import pytest
import torch
from attentions import DEVICE, check_writes, make, make_mask

from pabc.kernels import short_attention as module
from pabc.kernels.short_attention import OP, short_attention, short_attention_reference

pytestmark = pytest.mark.kernels
SHAPES = [  # N, H, T, S, D
    (3, 2, 16, 16, 32),
    (2, 3, 5, 5, 24),
    (1, 1, 1, 1, 8),
    (2, 1, 64, 64, 16),
    (1, 5, 33, 33, 40),
    (2, 2, 7, 13, 72),
    (1, 2, 3, 64, 128),
]


def options(shape, dtype, what, seed=1):
    T, D = shape[2], shape[4]
    g = torch.Generator().manual_seed(seed)
    found = {}
    mask = make_mask(shape, dtype, what)
    if mask is not None:
        found["mask"] = mask
    if "norm" in what:
        for name in ("q_weight", "k_weight"):
            found[name] = torch.rand(D, generator=g).to(dtype) + 0.5
    for pairs in ("halves", "neighbors"):
        if pairs in what:
            angle = torch.rand(T, D // 2, generator=g) * 6
            both = (
                torch.cat([angle, angle], -1)
                if pairs == "halves"
                else angle.repeat_interleave(2, -1)
            )
            found |= {"cos": both.cos(), "sin": both.sin(), "pairs": pairs}
    return {name: x.to(DEVICE) if torch.is_tensor(x) else x for name, x in found.items()}


def run(call, inputs, found, **others):
    names = ("mask", "q_weight", "k_weight", "cos", "sin")
    tensors = [found.get(name) for name in names]
    return call(*inputs, *tensors, others.get("scale"), 1e-6, found.get("pairs", "none"))


def define(inputs, found, dtype):
    """By the definition, in a dtype."""
    q, k, v = (x.to(dtype) for x in inputs)
    if "q_weight" in found:
        q, k = (
            x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * found[name].to(dtype)
            for x, name in ((q, "q_weight"), (k, "k_weight"))
        )
    if "cos" in found:
        cos, sin = found["cos"].to(dtype), found["sin"].to(dtype)
        if found["pairs"] == "halves":
            q, k = (
                x * cos + torch.cat([-b, a], -1) * sin for x in (q, k) for a, b in [x.chunk(2, -1)]
            )
        else:
            q, k = (
                x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin
                for x in (q, k)
            )
    return attentions.define(q, k, v, found.get("mask"))


CASES = ["", "bool", "added", "norm", "halves", "neighbors", "norm halves bool"]


TURNED = [shape for shape in SHAPES if shape[2] == shape[3]]
"""A rotary embedding needs as many keys as queries."""


@pytest.mark.parametrize(
    ("what", "shape"),
    [
        (what, shape)
        for what in CASES
        for shape in (TURNED if {"halves", "neighbors"} & set(what.split()) else SHAPES)
    ],
    ids=str,
)
def test_equals_the_definition(what, shape):
    for dtype, layout in itertools.product((torch.float32, torch.bfloat16), ("packed", "gaps")):
        inputs, found = make(shape, dtype, layout), options(shape, dtype, what)
        expected, same = (define(inputs, found, d) for d in (torch.float64, dtype))
        result = run(short_attention, inputs, found)
        reference = run(short_attention_reference, inputs, found)
        assert result.dtype == dtype and result.stride() == reference.stride()
        allowed, *errors = ((x.double() - expected).abs().max() for x in (same, result, reference))
        assert max(errors) <= 2 * allowed + 1e-6, (dtype, layout)


@pytest.mark.parametrize("what", ["", "bool", "norm neighbors"], ids=str)
def test_positions_of_a_frame_are_read_in_place(what):
    B, P, H, T, D = 2, 5, 3, 6, 24
    g = torch.Generator().manual_seed(2)
    packed = torch.randn(B, T, P, 3, H, D, generator=g).to(DEVICE)
    inputs = packed.permute(3, 0, 2, 4, 1, 5).unbind()
    found = options((P, H, T, T, D), torch.float32, what)
    if "mask" in found:
        found["mask"] = found["mask"][None].expand(1, P, 1, T, T)
    result = run(short_attention, inputs, found)
    flat = dict(found)
    if "mask" in found:
        flat["mask"] = found["mask"].expand(B, P, H, T, T).flatten(0, 1)
    expected = run(short_attention, [x.flatten(0, 1) for x in inputs], flat)
    assert torch.equal(result, expected.unflatten(0, (B, P)))
    assert result.permute(0, 3, 1, 2, 4).is_contiguous()
    assert run(short_attention_reference, inputs, found).stride() == result.stride()
    torch.testing.assert_close(run(short_attention_reference, inputs, found), result)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_element_is_written_and_no_more(shape, monkeypatch):
    check_writes(short_attention, module, shape, monkeypatch)


def test_is_an_op():
    inputs = make(SHAPES[0], torch.float32)
    torch.library.opcheck(OP, (*inputs,))
    assert torch.equal(OP(*inputs), run(short_attention, inputs, {}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (4, 8)}, r"q: expected shape \(\.\.\., H, T, D\), found \(4, 8\)"),
        ({"q": (1, 4, 8), "k": (1, 4, 8), "v": (1, 4, 8)}, "q: expected 4 dimensions .* or 5"),
        ({"q": (1, 1, 65, 8)}, "q: expected 1 to 64 tokens, found 65"),
        ({"q": (1, 1, 4, 130)}, "k: expected"),
        ({"v": (1, 1, 5, 8)}, r"v: expected shape \(1, 1, 4, 8\), found \(1, 1, 5, 8\)"),
        (
            {"mask": (2, 1, 4, 4)},
            r"mask: expected a shape that broadcasts to \(1, 1, 4, 4\)",
        ),
        ({"q_weight": (8,)}, "k_weight: expected given where q_weight is"),
        ({"cos": (4, 8)}, "cos: expected given where pairs is"),
    ],
)
def test_refusals(change, message):
    shapes = {"q": (1, 1, 4, 8), "k": (1, 1, 4, 8), "v": (1, 1, 4, 8)} | change
    found = {name: torch.ones(shape, device=DEVICE) for name, shape in shapes.items()}
    inputs = [found.pop(name) for name in "qkv"]
    with pytest.raises(ValueError, match=r"^short_attention\." + message):
        run(short_attention, inputs, found)
