"""capture: the graph is the model's, and the model is as it was."""

import gc

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, ONE_BLOCK, Case, Small, Table
from stages import capture_call, run_graph
from torch import nn

import pabc
from pabc.passes import capture

SCHEDULE = pabc.Schedule.pyramid([3, 2, 1], full=2)


class LazyAttribute(Small):
    table = None

    def extra(self, x):
        if self.table is None:
            self.table = torch.linspace(0, 1, x.shape[-1]) * 2
        return self.table


class LazyBuffer(Small):
    def extra(self, x):
        if not hasattr(self, "table"):
            self.register_buffer("table", torch.linspace(0, 1, x.shape[-1]) * 2, persistent=False)
        return self.table


class LazyBufferWithin(Small):
    """A module in the model registers the buffer."""

    class Table(nn.Module):
        def forward(self, x):
            if not hasattr(self, "table"):
                self.register_buffer("table", torch.linspace(0, 1, x.shape[-1]) * 2)
            return self.table

    def __init__(self):
        super().__init__()
        self.inner = self.Table()

    def extra(self, x):
        return self.inner(x)


class LazyDictionary(Small):
    def __init__(self):
        super().__init__()
        self.tables = {}

    def extra(self, x):
        if x.shape not in self.tables:
            self.tables[x.shape] = torch.linspace(0, 1, x.shape[-1]) * 2
        return self.tables[x.shape]


class LazyHelper(Small):
    def __init__(self):
        super().__init__()
        self.table = Table()

    def extra(self, x):
        return self.table.get(x.shape[-1])


class LazySubmodule(Small):
    def extra(self, x):
        if "scale" not in self._modules:
            self.scale = nn.Identity()
        return self.scale(x)


def snapshot(module):
    return {
        name: dict(vars(m)[name]) if name != "other" else None
        for m in module.modules()
        for name in ("_buffers", "_parameters", "_modules")
    } | {k: v for k, v in vars(module).items() if not k.startswith("_")}


@pytest.mark.parametrize(
    "make",
    [
        LazyAttribute,
        LazyBuffer,
        LazyBufferWithin,
        LazyDictionary,
        LazyHelper,
        LazySubmodule,
    ],
)
def test_the_model_is_as_it_was(make):
    """What a model builds at its first call is neither lost nor left in it as a fake tensor."""
    model, x = make().eval(), torch.randn(2, 4)
    before = snapshot(model)
    gm = capture_call(model, {"x": x})
    assert snapshot(model) == before
    with torch.no_grad():
        assert torch.equal(run_graph(gm, {"x": x}), make()(x))
        later = model(x)
    assert type(later) is torch.Tensor and torch.equal(later, make()(x))


def test_the_random_state_is_as_it_was():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    capture_call(Small(), {"x": torch.ones(2, 4)})
    assert torch.equal(torch.rand(2), expected)


class WritesBuffer(Small):
    def extra(self, x):
        self.calls.add_(1)
        return self.calls


class WritesInput(Small):
    def forward(self, x):
        return x.mul_(2) @ self.weight


@pytest.mark.parametrize(("make", "name"), [(WritesBuffer, "calls"), (WritesInput, "x")])
def test_a_forward_that_writes_is_refused(make, name):
    model, x = make(), torch.ones(2, 4)
    with pytest.raises(
        ValueError, match=rf"without side effects, found one that writes to \['{name}'\]"
    ):
        capture_call(model, {"x": x})
    assert torch.equal(x, torch.ones(2, 4)) and model.calls == 0


class Branching(Small):
    def extra(self, x):
        return 1.0 if x.sum() > 0 else 2.0


def test_a_model_that_cannot_be_traced_is_refused_with_the_reason():
    class Foreign(Small):
        def extra(self, x):
            return torch.from_numpy(x.numpy().copy()).apply_(lambda value: value + 1)

    message = r"could not capture Foreign: torch.export stopped in its own forward with "
    with pytest.raises(ValueError, match=message) as caught:
        capture_call(Foreign(), {"x": torch.ones(2, 4)})
    assert caught.value.__cause__ is not None


def test_a_model_that_fails_is_refused_with_its_own_error():
    message = r"running the model .* stopped with RuntimeError: mat1 and mat2 shapes"
    with pytest.raises(ValueError, match=message):
        capture_call(Small(), {"x": torch.ones(2, 5)})


def test_settings_of_the_process_are_as_they_were():
    settings = gc.isenabled(), dict(vars(torch.fx.config))
    capture_call(Small(), {"x": torch.ones(2, 4)})
    with pytest.raises(ValueError, match="could not capture"):
        capture_call(Small(), {"x": torch.ones(2, 5)})
    assert (gc.isenabled(), dict(vars(torch.fx.config))) == settings


def test_a_failed_capture_leaves_the_model_as_it_was():
    class Both(Branching, LazyAttribute):
        def extra(self, x):
            torch.nn.functional.linear(x, torch.ones(5, 5)) if x.sum() < 0 else None
            return LazyAttribute.extra(self, x) + Branching.extra(self, x)

    model = Both().eval()
    capture_call(model, {"x": torch.ones(2, 4)})
    with pytest.raises(ValueError, match="could not capture"):
        capture_call(model, {"x": -torch.ones(2, 4)})
    assert model.table is None
    assert type(model(torch.ones(2, 4))) is torch.Tensor


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_the_graph_gives_the_models_bits(case: Case, captured):
    model, gm = captured(case)
    call = case.call(step=1)
    with torch.no_grad():
        assert torch.equal(run_graph(gm, call), model(**call))


def test_parameters_are_shared():
    model, call = ONE_BLOCK.model(), ONE_BLOCK.call()
    gm = capture_call(model, call)
    with torch.no_grad():
        before = run_graph(gm, call)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        after = run_graph(gm, call)
        assert torch.equal(after, model(**call)) and not torch.equal(after, before)
    names = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    assert names == {name for name, _ in model.named_parameters()}


def test_a_weight_is_read_right_before_its_first_use():
    gm = capture_call(ONE_BLOCK.model(), ONE_BLOCK.call())
    nodes = list(gm.graph.nodes)
    for i, node in enumerate(nodes):
        if node.op == "get_attr":
            following = next(n for n in nodes[i:] if n.op != "get_attr")
            assert node in following.all_input_nodes


def test_a_model_captured_under_autocast_equals_it_there():
    model, call = ONE_BLOCK.model(), ONE_BLOCK.call()
    compiled = pabc.compile(model, SCHEDULE, backend="eager")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(compiled(**call), model(**call))


def test_capture_needs_no_gradients():
    gm, _ = capture(ONE_BLOCK.model(), (), ONE_BLOCK.call())
    with torch.no_grad():
        assert not run_graph(gm, ONE_BLOCK.call()).requires_grad


def test_ops_written_in_terms_of_others_are_taken_apart():
    """All but those that the passes know as a whole: attention, linear layers, norms."""

    class Composed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, y):
            x = torch.column_stack([self.linear(x), torch.multiply(x, y.type_as(x))])
            return F.scaled_dot_product_attention(x, x, x)

    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    gm = capture_call(Composed(), {"x": x, "y": y})
    ops = {str(n.target).removesuffix(".default") for n in gm.graph.nodes if n.op != "placeholder"}
    assert {"aten.linear", "aten.cat", "aten.mul.Tensor", "aten.scaled_dot_product_attention"} < ops
    assert not ops & {"aten.column_stack", "aten.hstack", "aten.multiply.Tensor", "aten.type_as"}
