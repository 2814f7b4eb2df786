import pytest
import torch
import torch.nn.functional as F
from graphs import assert_same_graph
from models import MODELS, Case
from stages import capture_call, run_graph
from torch import nn

from pabc.passes import canonicalize_pass


class Noisy(nn.Module):
    """Everything that the pass removes, once."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        y = F.linear(x, self.weight).to(torch.float32).clone().detach()
        y = self.drop(y) / 1.0
        z = F.linear(x, self.weight) * 1.0
        return y.view(y.shape) + torch.tanh(z)


def test_noise_goes_and_duplicates_merge():
    call = {"x": torch.randn(2, 4)}
    gm = capture_call(Noisy(), call)
    before = run_graph(gm, call)
    gm = canonicalize_pass(gm)
    gm.graph.lint()
    gm.recompile()
    assert_same_graph(
        gm,
        """
        graph(%x):
            %w = get_attr[weight]
            %y = linear(%x, %w)
            %t = tanh(%y)
            %sum = add(%y, %t)
            return (%sum,)
        """,
    )
    assert torch.equal(run_graph(gm, call), before)


def test_a_clean_graph_stays_as_it_is():
    class Clean(nn.Module):
        def forward(self, x):
            return torch.tanh(x) * x

    call = {"x": torch.randn(2, 4)}
    assert_same_graph(canonicalize_pass(capture_call(Clean(), call)), capture_call(Clean(), call))


def test_copies_that_do_something_stay():
    class Copies(nn.Module):
        def forward(self, x):
            return x.double(), x.t().contiguous(), x.clone(), torch.tanh(x / 2.0)

    call = {"x": torch.randn(2, 4)}
    gm = canonicalize_pass(capture_call(Copies(), call))
    gm.recompile()
    wide, transposed, copied, halved = gm(call["x"])
    assert wide.dtype == torch.float64
    assert transposed.stride() == (2, 1)
    assert copied is not call["x"] and copied.data_ptr() != call["x"].data_ptr()
    assert torch.equal(halved, torch.tanh(call["x"] / 2))


def test_a_returned_copy_of_a_view_of_an_input_stays_a_copy():
    class Flat(nn.Module):
        def forward(self, x):
            return x.view(-1).clone()

    x = torch.randn(2, 4)
    gm = canonicalize_pass(capture_call(Flat(), {"x": x}))
    gm.recompile()
    assert gm(x)[0].data_ptr() != x.data_ptr()


def test_a_returned_copy_of_a_weight_stays_a_copy():
    class Weight(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x + 1, self.weight.clone()

    model, x = Weight(), torch.randn(3)
    gm = canonicalize_pass(capture_call(model, {"x": x}))
    gm.recompile()
    assert gm(x)[1].data_ptr() != model.weight.data_ptr()


def test_random_ops_are_not_merged():
    class Random(nn.Module):
        def forward(self, x):
            return torch.rand_like(x) - torch.rand_like(x)

    gm = canonicalize_pass(capture_call(Random(), {"x": torch.randn(8)}))
    gm.recompile()
    assert not torch.equal(gm(torch.randn(8))[0], torch.zeros(8))


def test_equal_ops_with_unequal_scalars_are_not_merged():
    class Scalars(nn.Module):
        def forward(self, x):
            return (x + 1) * (x + 1.5)

    gm = canonicalize_pass(capture_call(Scalars(), {"x": torch.randn(8)}))
    assert_same_graph(
        gm,
        """
        graph(%x):
            %a = add(%x, 1)
            %b = add(%x, 1.5)
            %product = mul(%a, %b)
            return (%product,)
        """,
    )


def test_unused_inputs_stay():
    class Unused(nn.Module):
        def forward(self, x, y):
            return x + 1

    gm = canonicalize_pass(capture_call(Unused(), {"x": torch.ones(2), "y": torch.ones(3)}))
    assert [n.target for n in gm.graph.nodes if n.op == "placeholder"] == ["x", "y"]


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_bits_stay(case: Case, captured):
    model, gm = captured(case)
    gm = canonicalize_pass(gm)
    gm.graph.lint()
    gm.recompile()
    call = case.call(step=1)
    with torch.no_grad():
        assert torch.equal(run_graph(gm, call), model(**call))
