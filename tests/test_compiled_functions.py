"""compiled: what a model compiles itself is traced as written, and said to be."""

import pytest
import torch
from models import WIDTH, Branch, Mlp
from reading import NUM_STEPS, Plain, make, make_calls
from torch import nn

import pabc


@torch.compile(backend="eager")
def gate(x, y):
    return x + torch.sigmoid(y) * y


class Compiled(Branch):
    def forward(self, x, emb_BD, text=None):
        return gate(x, super().forward(x, emb_BD))


def with_compiled_module():
    block = Mlp()
    block.compile(backend="eager")
    return block


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.compile(nn.Sequential(nn.Linear(WIDTH, WIDTH)), backend="eager")

    def forward(self, x, emb_BD, text=None):
        return x + self.inner(x)


@pytest.mark.parametrize(
    ("block", "line"),
    [
        (Compiled, "gate in blocks.1"),
        (with_compiled_module, "blocks.1"),
        (Wrapped, "blocks.1.inner"),
    ],
)
@pytest.mark.parametrize("reads", [False, True])
def test_what_a_model_compiles_is_named(block, line, reads):
    class Reads(Plain):
        def forward(self, x_BCHW, t_B, n_1):
            return super().forward(x_BCHW * n_1.item() if reads else x_BCHW, t_B)

    model = make(Reads, Branch(), block())
    compiled = pabc.compile(model, pabc.Schedule.none(range(NUM_STEPS, 0, -1)), backend="eager")
    with torch.no_grad():
        for call in make_calls(n_1=torch.tensor(2)):
            assert torch.equal(compiled(**call), model(**call))
    (found,) = compiled.explain().compiled
    assert found.startswith(line)
    assert f"compiled by the model, traced as written: {line}" in str(compiled.explain())
    assert not pabc.explain(make(Plain, Branch()), **make_calls()[0]).compiled
