"""Norms of text and latents into one tensor: the kernel against each part's own."""

import pytest
import torch
from norms import DEVICE, define, make

from pabc.kernels import joint_norm as module
from pabc.kernels.joint_norm import OP, joint_norm, joint_norm_reference

pytestmark = pytest.mark.kernels
WHATS = {
    "norms": ["/ layer scale shift", "/ layer scale shift"],
    "sums": ["gated / layer scale shift", "gated plain-fp8 / layer weight bias scale shift"],
    "one sum": ["gated-fp8 / rms weight", "/ rms scale"],
    "three": ["gated / layer", "/ layer shift", "plain / layer"],
}
LENGTHS = (3, 8, 1)


def make_parts(whats, dtype, layout=""):
    """The op's arguments, and those of each part's own norm."""
    parts = [
        make((2, length, 72), dtype, what, layout)
        for what, length in zip(whats, LENGTHS, strict=False)
    ]
    x, *lists = zip(*(terms for terms, _ in parts), strict=True)
    terms = [[each for items in group for each in items] for group in lists]
    counts = [len(terms[1]) for terms, _ in parts]
    given = {name: [given[name] for _, given in parts] for name in parts[0][1]}
    after = [given[name] for name in ("weight", "bias", "scale", "shift", "offset")]
    writes = [y is not None for y in given["y_dtype"]]
    arguments = ([*x], *terms, counts, given["norm"][0], *after, given["eps"][0])
    return arguments, {"dim": 1, "writes_y": writes, "dtype": dtype}, parts


def define_parts(parts, dtype):
    found = [define(terms, given, dtype) for terms, given in parts]
    return [*(y for *ys, _ in found for y in ys), torch.cat([n for *_, n in found], 1)]


@pytest.mark.parametrize("name", WHATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["", "columns", "gaps"])
def test_equals_the_definition(name, dtype, layout):
    arguments, options, parts = make_parts(WHATS[name], dtype, layout)
    exact, same = (define_parts(parts, d) for d in (torch.float64, dtype))
    found, reference = (f(*arguments, **options) for f in (joint_norm, joint_norm_reference))
    for x, *others in zip(exact, same, found, reference, strict=True):
        allowed, *errors = ((other.double() - x).abs().max() for other in others)
        assert max(errors) <= 2 * allowed + 2e-6
        assert others[1].dtype == dtype and others[1].is_contiguous()


def test_every_element_is_written_and_no_more(monkeypatch):
    arguments, options, _ = make_parts(WHATS["sums"], torch.float32)
    expected = joint_norm(*arguments, **options)
    buffers = []

    def allocate(*_, **__):
        for each in expected:
            buffers.append(torch.full((each.numel() + 200,), float("nan"), device=DEVICE))
        return [b[100:-100].view(e.shape) for b, e in zip(buffers, expected, strict=True)]

    monkeypatch.setattr(module, "_allocate", allocate)
    found = joint_norm(*arguments, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(b[:100].isnan().all() and b[-100:].isnan().all() for b in buffers)


def test_is_an_op():
    arguments, options, _ = make_parts(WHATS["norms"], torch.float32)
    torch.library.opcheck(OP, arguments, options)
    found, expected = OP(*arguments, **options), joint_norm(*arguments, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("at", "changed", "message"),
    [
        (
            0,
            [torch.ones(2, 3, 72), torch.ones(3, 8, 72)],
            "x: expected equal shapes but for dimension 1",
        ),
        (5, [1], "counts: expected one for each part, 2, found 1"),
        (5, [1, 0], r"counts: expected 0 cuts in all, found \[1, 0\]"),
        (7, [None], "weight: expected one for each part, 2, found 1"),
    ],
)
def test_refusals(at, changed, message):
    arguments, options, _ = make_parts(WHATS["norms"], torch.float32)
    arguments = [*arguments[:at], changed, *arguments[at + 1 :]]
    with pytest.raises(ValueError, match=r"^joint_norm\." + message):
        joint_norm(*arguments, **options)


def test_the_last_dimension_is_refused():
    arguments, options, _ = make_parts(WHATS["norms"], torch.float32)
    with pytest.raises(
        ValueError, match=r"^joint_norm\.dim: expected a dimension of rows, found 2"
    ):
        joint_norm(*arguments, **{**options, "dim": 2})
