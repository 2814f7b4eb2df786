"""Modules that no trace can enter: the graph calls them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from models import Branch, Experts, Mlp, Routed, run_by_hand
from reading import FULL, MASKS, NUM_STEPS, Plain, generate, make, make_calls
from torch import nn

import pabc
from pabc.passes import capture


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_routed_experts_run_as_they_are_and_are_reused(backend):
    model, calls = make(Plain, Branch(), Experts(), Branch()), make_calls()
    schedule = pabc.Schedule.pyramid(range(NUM_STEPS, 0, -1), full=2, mlp=2)
    compiled = pabc.compile(model, schedule, backend=backend)
    results = generate(compiled, calls)
    masks = {**MASKS, ("mlp", 0): MASKS["full", 0]}
    for a, b in zip(results, run_by_hand(model, calls, masks, "attention"), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    found = compiled.explain()
    assert [r.kind for r in found.regions] == ["full", "mlp", "full"]
    (line,) = found.outside
    assert line.startswith("blocks.1.moe runs as it is: ")


def test_weights_of_a_module_that_runs_as_it_is_are_the_models():
    model, (call, *_) = make(Plain, Branch(), Experts()), make_calls()
    compiled = pabc.compile(model, pabc.Schedule.none([1]), backend="eager")
    compiled(**call)
    with torch.no_grad():
        model.blocks[1].moe.experts[0][0].weight.mul_(2)
        assert torch.equal(compiled(**call), model(**call))


class ThroughNumpy(Branch):
    """Attention in a library that PyTorch cannot trace."""

    class Inner(nn.Module):
        def forward(self, q, k, v):
            scores = np.einsum("bhid,bhjd->bhij", q.numpy(), k.numpy())
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            return torch.from_numpy(np.einsum("bhij,bhjd->bhid", weights, v.numpy()))

    def __init__(self):
        super().__init__()
        self.attn.attend = self.Inner()


def test_what_cannot_be_traced_runs_as_it_is_and_the_rest_is_reused():
    model, calls = make(Plain, Branch(), ThroughNumpy(), Mlp()), make_calls()
    compiled = pabc.compile(model, FULL, backend="eager")
    results = generate(compiled, calls)
    masks = {("full", 0): MASKS["full", 0]}
    expected = run_by_hand(model, calls, masks, "attention")
    assert all(map(torch.equal, results, expected))
    (line,) = compiled.explain().outside
    assert line.startswith("blocks.1.attn.attend runs as it is: numpy gives an array of shape")


class Failing(Branch):
    """Cannot be traced as a whole: a block that is no residual branch of its own."""

    def forward(self, x, emb_BD, text=None):
        return torch.from_numpy(super().forward(x, emb_BD).numpy() * 1)


def test_a_block_that_cannot_be_traced_hides_the_axes_of_what_follows():
    model, (call, *_) = make(Plain, Failing(), Branch()), make_calls()
    message = r"name the denoised input with latents= \(.* is opaque: .*\)"
    with pytest.raises(ValueError, match=message):
        pabc.explain(model, **call)
    message = r" is opaque; state it with kinds=\{'blocks.1.attn': "
    with pytest.raises(ValueError, match=message):
        pabc.explain(model, **call, latents="x_bchw")
    found = pabc.explain(model, **call, latents="x_bchw", kinds={"blocks.1.attn": "full"})
    assert [r.path for r in found.regions] == ["blocks.1.attn"]
    (line,) = found.outside
    assert line.startswith("blocks.0 runs as it is") and "1 attentions in it" in line


@dataclasses.dataclass
class Mixed:
    tokens: torch.Tensor
    counts: list
    label: str = "mixed"


class GivesDataclass(Routed):
    """An untraceable module with a dataclass among its arguments and for its result."""

    def forward(self, mixed):
        y = super().forward(mixed.tokens)
        return Mixed(y.transpose(0, 1).contiguous().transpose(0, 1), [y.sum()], mixed.label)


class ThroughDataclass(Experts):
    def __init__(self):
        super().__init__()
        self.moe = GivesDataclass()

    def forward(self, x, emb_BD, text=None):
        mixed = self.moe(Mixed(self.norm(x), []))
        return x + self.end(mixed.tokens * 2 + mixed.counts[0] * len(mixed.label))


def test_dataclasses_into_and_out_of_a_module_that_runs_as_it_is():
    model, calls = make(Plain, Branch(), ThroughDataclass()), make_calls()
    compiled = pabc.compile(model, FULL, backend="eager")
    masks = {("full", 0): MASKS["full", 0]}
    expected = run_by_hand(model, calls, masks, "attention")
    assert all(map(torch.equal, generate(compiled, calls), expected))


def test_a_module_that_cannot_be_traced_and_writes_to_its_arguments_is_refused():
    class Writes(Routed):
        def forward(self, x):
            return super().forward(x.mul_(2))

    block = Experts()
    block.moe = Writes()
    model, (call, *_) = make(Plain, block), make_calls()
    with pytest.raises(ValueError, match=r"(?s)blocks\.0\.moe cannot be .* writes to its argum"):
        pabc.explain(model, **call)


class Untraced(nn.Module):
    """Gives what it is given, in another precision where told to."""

    def __init__(self):
        super().__init__()
        self.wider = []

    def forward(self, x):
        x.numpy()
        return x.double() if self.wider else x


class Passed(Branch):
    def __init__(self):
        super().__init__()
        self.inner = Untraced()

    def forward(self, x, emb_BD, text=None):
        return super().forward(self.inner(x).float(), emb_BD)


def test_results_of_a_module_that_runs_as_it_is_are_no_arguments():
    """As a compiler takes for granted that uses the memory of one for another."""
    model, (call, *_) = make(Plain, Passed()), make_calls()
    (outside,) = capture(model, (), call)[1].calls
    x = outside.fake([])[0].fill_(2)
    (y,) = outside.run([x])
    assert torch.equal(x, y) and x.data_ptr() != y.data_ptr()


def test_other_results_of_a_module_that_runs_as_it_is_are_refused():
    model, (call, *_) = make(Plain, Passed()), make_calls()
    compiled = pabc.compile(
        model, pabc.Schedule.none([2, 1]), backend="eager", latents="x_bchw", kinds={"*": "full"}
    )
    compiled(**call)
    model.blocks[0].inner.wider.append(True)
    with pytest.raises(RuntimeError, match=r"(?s)blocks\.0\.inner runs outside.*float32.*float64"):
        compiled(**call)
