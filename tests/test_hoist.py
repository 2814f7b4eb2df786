"""hoist: what is steady over a generation runs once, and again when it has changed."""

import pytest
import torch
from torch import nn

import pabc
from pabc import passes
from pabc.passes.ir import user_inputs


class Crossed(nn.Module):
    """One cross attention: keys and values depend on the text alone."""

    def __init__(self, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.text = nn.Linear(5, width)

    def forward(self, x, t, text):
        e = self.text(text)
        h = x + t[:, None, None]
        projected = (self.q(h), self.k(e), self.v(e))
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in projected)
        o = nn.functional.scaled_dot_product_attention(q, k, v)
        return h + self.out(o.transpose(1, 2).flatten(2))


@pytest.fixture
def model():
    return Crossed().eval()


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return torch.randn(2, 6, 8), torch.tensor([0.1, 0.2]), torch.randn(2, 3, 5)


def hoisted(model, inputs):
    gm = passes.canonicalize_pass(passes.capture(model, inputs, {}))
    gm = passes.mark_regions_pass(passes.tag_attention_pass(passes.name_axes_pass(gm)))
    gm = passes.hoist_invariants_pass(gm)
    gm.recompile()
    passes.verify_hoist(gm)
    return gm


def test_projections_of_the_text_move_to_the_prologue(model, inputs):
    gm = hoisted(model, inputs)
    prologue = gm.meta["prologue"]
    linears = [n for n in prologue.graph.nodes if "linear" in str(n.target)]
    assert len(linears) == 3  # text, k, v
    assert [n.name for n in user_inputs(gm.graph)[3:]] == ["hoisted_0", "hoisted_1"]
    assert gm.meta["steady"] == (2,)
    left = [n for n in gm.graph.nodes if "linear" in str(n.target)]
    assert len(left) == 2  # q, out
    (output,) = gm(*inputs, *prologue(*inputs))
    assert torch.equal(output, model(*inputs))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.lin(x)


def test_nothing_to_hoist():
    model, x = Plain().eval(), torch.randn(2, 3, 4)
    gm = hoisted(model, (x,))
    assert gm.meta["prologue"](x) == ()
    assert [n.name for n in user_inputs(gm.graph)] == ["x"]
    assert torch.equal(gm(x)[0], model(x))


class Quantized(nn.Module):
    """A projection of the text whose weight is kept as bytes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("values", torch.arange(64, dtype=torch.int8).view(8, 8))
        self.register_buffer("scale", torch.ones(8, 1))

    def forward(self, x, text):
        weight = self.values.to(x.dtype) * self.scale
        return nn.functional.linear(x, weight) + nn.functional.linear(text, weight).sum(1)[:, None]


def test_unpacked_weights_are_not_kept_for_a_generation():
    model, x, text = Quantized().eval(), torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    gm = hoisted(model, (x, text))
    (kept,) = gm.meta["prologue"](x, text)  # what is made of the text, and not the weight
    assert kept.shape == (2, 1, 8)
    assert torch.equal(gm(x, text, kept)[0], model(x, text))


STEPS = tuple(range(6, 0, -1))
SCHEDULE = pabc.Schedule.pyramid(STEPS, cross=2)


def count_prologues(fast, monkeypatch):
    program, _ = fast._captured("test")
    calls, original = [], program._prologue.forward
    monkeypatch.setattr(
        program._prologue, "forward", lambda *args: calls.append(1) or original(*args)
    )
    return calls


def test_prologue_runs_once_a_generation(model, inputs, monkeypatch):
    fast = pabc.compile(model, SCHEDULE, backend="eager", example_inputs=(inputs, {}))
    calls = count_prologues(fast, monkeypatch)
    for _ in range(2):
        for _ in STEPS:
            fast(*inputs)
    assert len(calls) == 2


def test_changed_text_or_weights_are_seen_at_once(model, inputs, monkeypatch):
    fast = pabc.compile(model, pabc.Schedule.none(STEPS), backend="eager")
    x, t, text = inputs
    fast(x, t, text)
    calls = count_prologues(fast, monkeypatch)
    assert torch.equal(fast(x, t, text * 2), model(x, t, text * 2))  # another tensor
    text.mul_(3)
    assert torch.equal(fast(x, t, text), model(x, t, text))  # changed in place
    with torch.no_grad():
        model.k.weight.mul_(2)
    assert torch.equal(fast(x, t, text), model(x, t, text))  # a weight
    assert len(calls) == 3
    fast(x, t, text)
    assert len(calls) == 3


def test_inference_tensors_are_never_trusted(model, inputs):
    fast = pabc.compile(model, pabc.Schedule.none(STEPS), backend="eager")
    with torch.inference_mode():
        x, t, text = (tensor.clone() for tensor in inputs)
        fast(x, t, text)
        text.mul_(2)
        assert torch.equal(fast(x, t, text), model(x, t, text))
