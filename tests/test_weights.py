"""The weights of a graph: values in place, tensors replaced, layouts, adapters, quantization."""

import copy
import math

import pytest
import torch
from models import ONE_BLOCK
from stages import apply, capture_call, copy_graph
from torch import nn
from torch.nn.utils import parametrize
from weights import Int8Tensor, add_adapter, quantize, with_int8_tensor

from pabc.passes import Captured
from pabc.runtime.weights import Weights


class Scaled(nn.Module):
    """A module that holds tensors and values in every way there is."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(4, 4)
        self.register_buffer("shift", torch.randn(4))
        self.table = torch.randn(4)
        self.tables = [torch.randn(4)]
        self.scales = {"first": 0.5, "second": math.nan}
        self.enabled = True

    def forward(self, x):
        y = self.lin(x) * self.table + self.shift + self.tables[0]
        return x + y * self.scales["first"] if self.enabled else x


def captured_weights(model, **call):
    gm = capture_call(model, call)
    return gm, apply(make_weights, gm, Captured)


def make_weights(gm, captured):
    return Weights([gm], captured)


@pytest.fixture
def tracked():
    model = ONE_BLOCK.model()
    return model, *captured_weights(model, **ONE_BLOCK.call())


@pytest.fixture
def scaled():
    model = Scaled().eval()
    return model, *captured_weights(model, x=torch.ones(2, 4))


def replace_parameter(model):
    model.head.weight = nn.Parameter(torch.randn_like(model.head.weight))


def test_all_parameters_are_tracked(tracked):
    model, _, weights = tracked
    names = [name for name, _ in model.named_parameters()]
    held = weights.get(names)
    assert all(h is p for h, p in zip(held, model.parameters(), strict=True))


def test_nothing_replaced_is_nothing_to_do(tracked):
    model, gm, weights = tracked
    with torch.no_grad():
        model.head.weight.mul_(2)
    model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()})
    assert weights.is_current(model)
    assert weights.follow(model, [gm]) == []


def test_a_replaced_parameter_is_followed_in_every_graph(tracked):
    model, gm, weights = tracked
    other = copy_graph(gm)
    assert weights.is_current(model)
    replace_parameter(model)
    assert not weights.is_current(model)
    assert weights.follow(model, [gm, other]) == ["head.weight"]
    assert weights.is_current(model)
    assert weights.get(["head.weight"]) == [model.head.weight]
    call = ONE_BLOCK.call()
    with torch.no_grad():
        expected = model(**call)
        for graph in (gm, other):
            assert torch.equal(graph(*call.values())[0], expected)
    assert weights.follow(model, [gm, other]) == []


def test_equal_values_are_not_the_same_tensor(tracked):
    model, _, weights = tracked
    assert weights.is_current(model)
    model.head.bias = nn.Parameter(model.head.bias.detach().clone())
    assert not weights.is_current(model)


def test_every_tensor_is_followed_when_all_are_replaced(tracked):
    model, gm, weights = tracked
    state = {k: v * 2 for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert not weights.is_current(model)
    assert sorted(weights.follow(model, [gm])) == sorted(state)
    assert weights.is_current(model)


@pytest.mark.parametrize("name", ["shift", "table"])
def test_buffers_and_plain_attributes_are_followed(scaled, name):
    model, gm, weights = scaled
    x = torch.randn(2, 4)
    getattr(model, name).mul_(2)
    assert weights.is_current(model)
    assert torch.equal(gm(x)[0], model(x))
    setattr(model, name, torch.randn(4))
    assert not weights.is_current(model)
    assert weights.follow(model, [gm]) == [name]
    assert weights.is_current(model)
    assert torch.equal(gm(x)[0], model(x))


def test_a_plain_tensor_that_two_modules_share():
    model = nn.Sequential(Scaled(), Scaled()).eval()
    model[1].table = model[0].table
    gm, weights = captured_weights(model, input=torch.ones(2, 4))
    model[1].table = torch.randn(4)
    assert not weights.is_current(model)
    assert weights.follow(model, [gm]) is None


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
    assert weights.is_current(model)
    change(model)
    assert not weights.is_current(model)
    assert weights.follow(model, [gm]) is None


def test_a_part_moved_to_another_dtype_no_longer_fits(tracked):
    model, gm, weights = tracked
    model.blocks[1].double()  # the very parameters, with other data
    assert weights.follow(model, [gm]) is None


def test_a_removed_bias_no_longer_fits(tracked):
    model, gm, weights = tracked
    model.head.bias = None
    assert not weights.is_current(model)
    assert weights.follow(model, [gm]) is None


def test_an_added_bias_no_longer_fits():
    model = nn.Linear(4, 4, bias=False).eval()
    gm, weights = captured_weights(model, input=torch.ones(2, 4))
    model.bias = nn.Parameter(torch.ones(4))
    assert weights.follow(model, [gm]) is None


def test_a_removed_module_no_longer_fits(tracked):
    model, gm, weights = tracked
    model.blocks[1].mlp[0] = nn.Sequential(model.blocks[1].mlp[0], nn.Tanh())
    assert not weights.is_current(model)
    assert weights.follow(model, [gm]) is None


def test_an_added_adapter_no_longer_fits(tracked):
    model, gm, weights = tracked
    add_adapter(model)
    assert not weights.is_current(model)
    assert weights.follow(model, [gm]) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.scales.update(first=0.25),
        lambda m: setattr(m, "enabled", False),
        lambda m: m.tables.__setitem__(0, torch.ones(4)),
        lambda m: m.lin.register_forward_hook(lambda m, args, y: y * 2),
        lambda m: m.lin.train(),
        lambda m: m.add_module("extra", nn.Identity()),
        lambda m: parametrize.register_parametrization(m.lin, "weight", nn.Tanh()),
        lambda m: setattr(m, "forward", lambda x: x),
    ],
    ids=["number", "flag", "list", "hook", "training", "module", "parametrization", "forward"],
)
def test_a_changed_value_of_a_module_no_longer_fits(scaled, caplog, change):
    caplog.set_level("INFO")
    model, gm, weights = scaled
    copy.deepcopy(model)
    model(torch.ones(2, 4))
    assert weights.follow(model, [gm]) == []
    change(model)
    assert weights.follow(model, [gm]) is None
    assert "changed" in caplog.text or "new" in caplog.text


def test_what_a_library_notes_on_a_module_is_no_change(scaled):
    model, gm, weights = scaled
    model._registry = object()
    assert weights.follow(model, [gm]) == []


def test_a_parametrized_weight_is_followed():
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    nn.utils.parametrizations.weight_norm(model[0])
    gm, weights = captured_weights(model, input=torch.ones(2, 4))
    assert weights.is_current(model)
    inner = model[0].parametrizations.weight
    inner.original0 = nn.Parameter(inner.original0.detach() * 2)
    assert not weights.is_current(model)
    assert weights.follow(model, [gm]) == ["0.parametrizations.weight.original0"]
    x = torch.randn(2, 4)
    with torch.no_grad():
        assert torch.equal(gm(x)[0], model(x))


@pytest.mark.parametrize("name", ["to_q", "to_k"])
def test_a_parameter_that_is_no_longer_shared_is_noticed(name):
    model, call = ONE_BLOCK.model(), ONE_BLOCK.call()
    attn = model.blocks[0].attn
    attn.to_k.weight = attn.to_q.weight
    gm = capture_call(model, call)
    weights = apply(make_weights, gm, Captured)
    assert weights.is_current(model)
    getattr(attn, name).weight = nn.Parameter(torch.randn(16, 16))
    assert not weights.is_current(model)
    if weights.follow(model, [gm]) is not None:
        with torch.no_grad():
            assert torch.equal(gm(*call.values())[0], model(**call))


# ---- quantized weights ----


def test_a_weight_made_of_several_tensors_is_followed():
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    with_int8_tensor(model[0])
    gm, weights = captured_weights(model, input=torch.ones(2, 4))
    assert weights.is_current(model)
    (values,) = weights.get(["0.weight.values"])
    assert values is model[0].weight.values
    model[0].weight.scale.mul_(2)
    assert weights.is_current(model)
    model[0].weight = nn.Parameter(Int8Tensor(*quantize(nn.Linear(4, 4))), requires_grad=False)
    assert not weights.is_current(model)
    assert sorted(weights.follow(model, [gm])) == ["0.weight.scale", "0.weight.values"]
    assert weights.is_current(model)
    model[0].weight.scale = model[0].weight.scale * 2
    assert not weights.is_current(model)
    assert weights.follow(model, [gm]) == ["0.weight.scale"]
    x = torch.randn(2, 4)
    with torch.no_grad():
        assert torch.equal(gm(x)[0], model(x))


def test_packed_weights_are_refused_with_the_remedy():
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    weight = torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, torch.qint8)
    model[0].packed = torch.ops.quantized.linear_prepack(weight, None)
    with pytest.raises(ValueError, match=r"0\.packed is a TorchScript object.*torchao"):
        capture_call(model, {"input": torch.ones(2, 4)})
