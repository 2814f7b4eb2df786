import pytest
import torch
from conftest import capture_call, copy_graph
from models import Branch, Case, Image, Mlp
from torch import nn

from pabc.weights import Weights

CASE = Case("weights", lambda: Image(Branch(), Mlp()), "BCHW", ("full",))


@pytest.fixture
def tracked():
    model = CASE.model()
    gm = capture_call(model, CASE.call())
    return model, gm, Weights([gm])


def test_all_parameters_are_tracked(tracked):
    model, _, weights = tracked
    names = [name for name, _ in model.named_parameters()]
    held = weights.get(names)
    assert all(h is p for h, p in zip(held, model.parameters(), strict=True))


def test_nothing_replaced_is_nothing_to_do(tracked):
    model, gm, weights = tracked
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert weights.follow(model, [gm]) == []


def test_a_replaced_parameter_is_followed_in_every_graph(tracked):
    model, gm, weights = tracked
    other = copy_graph(gm)
    model.head.weight = nn.Parameter(torch.randn_like(model.head.weight))
    assert weights.follow(model, [gm, other]) == ["head.weight"]
    assert weights.get(["head.weight"]) == [model.head.weight]
    call = CASE.call()
    with torch.no_grad():
        expected = model(**call)
        for graph in (gm, other):
            assert torch.equal(graph(*call.values())[0], expected)
    assert weights.follow(model, [gm, other]) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.double(),
        lambda m: m.to("meta"),
        lambda m: setattr(m, "head", nn.Linear(16, 24)),
        lambda m: setattr(m.head, "weight", nn.Parameter(torch.randn(16, 12).t())),
    ],
    ids=["dtype", "device", "shape", "strides"],
)
def test_a_changed_layout_no_longer_fits(tracked, change):
    model, gm, weights = tracked
    change(model)
    assert weights.follow(model, [gm]) is None


def test_a_removed_bias_no_longer_fits(tracked):
    model, gm, weights = tracked
    model.head.bias = None
    assert weights.follow(model, [gm]) is None


def test_a_removed_module_no_longer_fits(tracked):
    model, gm, weights = tracked
    model.blocks[1].mlp[0] = nn.Sequential(model.blocks[1].mlp[0], nn.Tanh())
    assert weights.follow(model, [gm]) is None


@pytest.mark.parametrize("name", ["to_q", "to_k"])
def test_a_parameter_that_is_no_longer_shared_is_noticed(name):
    model, call = CASE.model(), CASE.call()
    attn = model.blocks[0].attn
    attn.to_k.weight = attn.to_q.weight
    gm = capture_call(model, call)
    weights = Weights([gm])
    getattr(attn, name).weight = nn.Parameter(torch.randn(16, 16))
    if weights.follow(model, [gm]) is not None:
        with torch.no_grad():
            assert torch.equal(gm(*call.values())[0], model(**call))
