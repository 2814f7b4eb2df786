"""Parameters that are more than tensors, GGUF's quantized ones first, while a model is traced."""

import pytest
import torch
from torch import nn

import pabc

gguf = pytest.importorskip("gguf")
utils = pytest.importorskip("diffusers.quantizers.gguf.utils")
STEPS = (3, 2, 1)
FORMATS = [gguf.GGMLQuantizationType[name] for name in ("Q8_0", "Q4_0", "BF16")]


class Model(nn.Module):
    def __init__(self, make_linear):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(8, 32)
        self.query, self.out = make_linear(32, 32), make_linear(32, 32)

    def forward(self, x, t):
        h = self.embed(x)
        q = self.query(h).unflatten(-1, (2, 16)).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
        return x + (h + self.out(y))[..., :8] * t.view(-1, 1, 1)


def quantized(kind):
    def make(inner, outer):
        plain = nn.Linear(inner, outer)
        made = utils.GGUFLinear(inner, outer, True, compute_dtype=torch.float32)
        data = gguf.quants.quantize(plain.weight.detach().numpy(), kind)
        made.weight = utils.GGUFParameter(torch.from_numpy(data), quant_type=kind)
        made.bias = plain.bias
        return made

    return make


def run(model):
    x = torch.linspace(-1, 1, 2 * 4 * 8).view(2, 4, 8)
    with torch.no_grad():
        return torch.stack([model(x * t, torch.tensor([float(t)] * 2)) for t in STEPS])


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_quantized_weights_are_unpacked_by_the_graph(kind):
    model = Model(quantized(kind)).eval()
    fast = pabc.compile(model, pabc.Schedule.none(STEPS), backend="eager")
    assert torch.equal(run(fast), run(model))
    fast.schedule = pabc.Schedule.from_masks(STEPS, {"full": (False, True, True)})
    run(fast)
    assert fast.stats.reused == 2 and fast.stats.captures == 1
    assert not fast.explain().outside
    prologue = fast.phases and next(p for _, p in fast._programs.items()).prologue.graph
    assert not any("weight" in str(n.target) for n in prologue.graph.nodes), "nothing is kept"
    assert type(model.query.weight) is utils.GGUFParameter
    assert model.query.weight.quant_type is kind


def test_quantized_weights_with_inductor():
    model = Model(quantized(FORMATS[0])).eval()
    fast = pabc.compile(model, pabc.Schedule.none(STEPS))
    torch.testing.assert_close(run(fast), run(model), atol=1e-3, rtol=0)


def test_weights_that_are_replaced_are_followed():
    kind = FORMATS[0]
    model, other = Model(quantized(kind)).eval(), Model(quantized(kind)).eval()
    fast = pabc.compile(model, pabc.Schedule.none(STEPS), backend="eager")
    run(fast)
    other.query.weight = utils.GGUFParameter(other.query.weight.data.flip(0), quant_type=kind)
    model.query.weight = other.query.weight
    assert torch.equal(run(fast), run(other)) and fast.stats.captures == 1


class Scaled(nn.Parameter):
    """A parameter with an attribute, and methods, of its own."""

    def unpack(self):
        return self.data.float() * self.scale


class UnpackingLinear(nn.Linear):
    def __init__(self, inner, outer):
        super().__init__(inner, outer)
        weight = Scaled((self.weight.detach() * 100).to(torch.int8), requires_grad=False)
        weight.scale = 0.01
        self.weight = weight

    def forward(self, x):
        assert isinstance(self.weight, Scaled)
        return nn.functional.linear(x, self.weight.unpack(), self.bias * self.bias.factor)


def make_unpacking(inner, outer):
    made = UnpackingLinear(inner, outer)
    made.bias.factor = 2.0
    return made


def test_attributes_and_classes_of_parameters_are_seen_while_traced():
    model = Model(make_unpacking).eval()
    fast = pabc.compile(model, pabc.Schedule.none(STEPS), backend="eager")
    assert torch.equal(run(fast), run(model)) and not fast.explain().outside
    assert type(model.query.weight) is Scaled and vars(model.query.weight) == {"scale": 0.01}
    assert "_make_subclass" not in vars(torch.Tensor)


class Raised(nn.Parameter):
    """Has each of PyTorch's functions give one more than it gives."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result + 1 if isinstance(result, torch.Tensor) else result


def make_raised(inner, outer):
    made = nn.Linear(inner, outer)
    made.weight = Raised(made.weight.detach(), requires_grad=False)
    return made


def test_functions_of_a_class_are_traced_and_not_called_again_by_the_graph():
    model = Model(make_raised).eval()
    fast = pabc.compile(model, pabc.Schedule.none(STEPS), backend="eager")
    assert torch.equal(run(fast), run(model)) and not fast.explain().outside
