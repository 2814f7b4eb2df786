"""failures: modules that stop a trace, found in one trace."""

import pytest
import torch
import torch.nn.functional as F
from models import WIDTH, Branch, Mlp, make_mlp
from reading import NUM_STEPS, Plain, generate, make, make_calls
from torch import nn
from torch._subclasses.functional_tensor import FunctionalTensor

import pabc

NONE = pabc.Schedule.none(range(NUM_STEPS, 0, -1))


class Adds(nn.Module):
    """A residual branch around a module, which may run as it is."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x, emb_BD, text=None):
        return x + self.part(x)


def make_failing(i):
    """A class of its own: its code is like that of no other."""

    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_mlp()

        def forward(self, x):
            y = self.inner(x)
            refuse(x, f"number {i} is not to be traced")
            return y * i

    return Fails()


def refuse(x, why):
    if isinstance(x, torch._subclasses.FakeTensor | FunctionalTensor):
        raise RuntimeError(why)


class InNumPy(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return torch.from_numpy(x.numpy() * self.scale)


@pytest.fixture
def traces(monkeypatch):
    seen, original = [], torch.export.export
    monkeypatch.setattr(
        torch.export, "export", lambda *a, **k: (seen.append(1), original(*a, **k))[1]
    )
    return seen


def check(model, num_outside):
    calls = make_calls()
    compiled = pabc.compile(model, NONE, backend="eager")
    with torch.no_grad():
        for result, call in zip(generate(compiled, calls), calls, strict=True):
            assert torch.equal(result, model(**call))
    outside = compiled.explain().outside
    assert len(outside) == num_outside
    return outside


def test_modules_of_different_code_are_found_in_one_trace(traces):
    parts = [Adds(make_failing(i)) for i in range(5)]
    outside = check(make(Plain, *parts, Branch()), 5)
    assert all(f"number {i} is" in line for i, line in enumerate(outside))
    assert len(traces) == 3  # as it is, with recorded values, and without those modules


def test_modules_that_go_through_numpy_take_no_trace_to_find(traces):
    parts = [Adds(part) for part in (InNumPy(2.0), make_failing(0), InNumPy(3.0))]
    check(make(Plain, Branch(), *parts), 3)
    assert len(traces) == 3


def test_a_module_whose_callee_stops_the_trace_is_part_of_the_graph():
    part = nn.Sequential(nn.Linear(WIDTH, WIDTH), make_failing(1))
    (line,) = check(make(Plain, Branch(), Adds(part)), 1)
    assert line.startswith("blocks.1.part.1 ")


def test_one_module_within_another_that_run_as_they_are():
    """What the inner one is called for by the outer one is the outer one's affair."""
    shared = make_failing(1)

    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = shared

        def forward(self, x):
            y = self.first(x[:, :2])
            refuse(x, "nor is what calls it")
            return x * y.mean()

    blocks = [Adds(part) for part in (shared, Holds(), shared)]
    outside = check(make(Plain, *blocks, Branch()), 2)
    assert [line.split()[0] for line in outside] == ["blocks.0.part", "blocks.1.part"]


def test_reads_before_and_after_a_module_that_stops_the_trace():
    class Reads(Plain):
        def forward(self, x_BCHW, t_B, lengths):
            x = x_BCHW[:, : lengths[0].item()].sum() + x_BCHW
            return super().forward(x, t_B) * int(lengths.max())

    class ReadsAndFails(nn.Module):
        def forward(self, x):
            n = int((x > 0).sum()) % 3 + 1  # one more read, by the same function
            refuse(x, "not to be traced")
            return x * n

    model = make(Reads, Branch(), Adds(ReadsAndFails()), Mlp())
    compiled = pabc.compile(model, NONE, backend="eager")
    with torch.no_grad():
        for call in make_calls(lengths=torch.tensor([2, 5])):
            assert torch.equal(compiled(**call), model(**call))
    assert compiled.stats.captures == 1


class Perturbed:
    """An attention's processor that no tracer can make functional: it writes to a diagonal."""

    def __call__(self, attn, x):
        q, k, v = (f(x)[:, None] for f in (attn.to_q, attn.to_k, attn.to_v))
        mask = torch.ones(1, 1, x.shape[1], x.shape[1], dtype=x.dtype)
        mask[..., 1:, 1:].fill_(-1e9)
        mask[0, 0, 1:, 1:].fill_diagonal_(0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, 0]


class Processed(nn.Module):
    def __init__(self, processor=None):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.processor = processor

    def forward(self, x):
        if self.processor is not None:
            return self.processor(self, x)
        q, k, v = (f(x)[:, None] for f in (self.to_q, self.to_k, self.to_v))
        return F.scaled_dot_product_attention(q, k, v)[:, 0]


def test_a_module_whose_traced_code_cannot_be_made_functional_runs_as_it_is():
    blocks = [Branch(), Branch(), Branch()]
    for block, processor in zip(blocks, (None, Perturbed(), None), strict=True):
        block.attn = Processed(processor)
    (line,) = check(make(Plain, *blocks), 1)
    assert line.startswith("blocks.1.attn runs as it is: ")
    assert "1 attentions in it" in line
