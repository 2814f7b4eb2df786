import gc
import inspect
import warnings
from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import capture_call, run_graph
from models import MODELS, Branch, Case, Image, Mlp
from torch import nn

import pabc
from pabc.passes import bind_arguments, capture

CASE = Case("capture", lambda: Image(Branch(), Mlp()), "BCHW", ("full",))
SCHEDULE = pabc.Schedule.pyramid([3, 2, 1], full=2)


class Small(nn.Module):
    """x @ weight, plus what a subclass adds."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))
        self.register_buffer("calls", torch.zeros(1))

    def extra(self, x):
        return 0.0

    def forward(self, x):
        return x @ self.weight + self.extra(x)


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


class Table:
    values = None

    def get(self, size):
        if self.values is None:
            self.values = torch.linspace(0, 1, size) * 2
        return self.values


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


class Counting(Small):
    count = 0

    def extra(self, x):
        self.count += 1
        return 1.0


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
        Counting,
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
    model, call = CASE.model(), CASE.call()
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
    gm = capture_call(CASE.model(), CASE.call())
    nodes = list(gm.graph.nodes)
    for i, node in enumerate(nodes):
        if node.op == "get_attr":
            following = next(n for n in nodes[i:] if n.op != "get_attr")
            assert node in following.all_input_nodes


def options(x, scale=2.0, *, shift=None, flags=(1, 2)):
    raise NotImplementedError


X, Y = torch.ones(1), torch.zeros(1)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X,), {}),
        ((X, 2.0), {}),
        ((), {"x": X}),
        ((), {"scale": 2.0, "x": X}),
        ((X,), {"shift": None, "flags": (1, 2)}),
    ],
)
def test_every_spelling_of_a_call_binds_alike(args, kwargs):
    signature = inspect.signature(options)
    assert bind_arguments(signature, args, kwargs) == ((X, 2.0), {"shift": None, "flags": (1, 2)})


def test_a_call_that_does_not_bind_raises_as_the_model_would():
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        bind_arguments(inspect.signature(options), (), {"scale": 1.0})


def test_spellings_share_a_capture():
    model, call = CASE.model(), CASE.call()
    compiled = pabc.compile(model, SCHEDULE, backend="eager")
    captures = []
    original = pabc.passes.capture
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            pabc.passes, "capture", lambda *a, **k: captures.append(1) or original(*a, **k)
        )
        first = compiled(**call)
        compiled.reset()
        assert torch.equal(compiled(*call.values()), first)
        compiled.reset()
        x, *rest = call.items()
        assert torch.equal(compiled(x[1], **dict(rest)), first)
    assert len(captures) == 1


class Nested(Small):
    def forward(self, x, condition=None, *, return_dict=True):
        y = x @ self.weight + (
            0.0 if condition is None else condition["scale"] * condition["shift"][0]
        )
        return {"sample": y, "extra": [y * 2, None]} if return_dict else (y,)


def test_nested_arguments_and_results_keep_their_structure():
    model = Nested().eval()
    call = {"x": torch.randn(2, 3, 4), "condition": {"scale": 2.0, "shift": [torch.ones(4)]}}
    compiled = pabc.compile(model, SCHEDULE, backend="eager", latents="x")
    result, expected = compiled(**call), model(**call)
    assert result.keys() == expected.keys() and result["extra"][1] is None
    assert torch.equal(result["sample"], expected["sample"])
    assert torch.equal(result["extra"][0], expected["extra"][0])
    short = compiled(**call, return_dict=False)
    assert isinstance(short, tuple) and torch.equal(short[0], expected["sample"])


class Mode(Enum):
    FIRST = 1
    SECOND = 2


@dataclass
class Result:
    sample: torch.Tensor


class GivesDataclass(Small):
    def forward(self, x):
        return Result(sample=x @ self.weight)


def test_dataclass_results():
    x = torch.randn(2, 3, 4)
    result = pabc.compile(GivesDataclass().eval(), SCHEDULE, backend="eager")(x)
    assert isinstance(result, Result) and torch.equal(result.sample, x)


@dataclass(frozen=True, slots=True)
class Condition:
    scale: float
    shift: torch.Tensor | None = None
    parts: tuple[torch.Tensor, ...] = ()


class Pair(NamedTuple):
    first: torch.Tensor
    second: Result | None


@dataclass
class Derived(OrderedDict):
    """A dictionary with fields, filled after the fact, as model libraries have."""

    sample: torch.Tensor
    extra: Any = None
    count: int = field(default=0, init=False)

    def __post_init__(self):
        self["sample"] = self.sample
        self.count += 1


class GivesMany(Small):
    """Takes a dataclass and gives nested results in several types."""

    def forward(self, x, condition=None, mode=Mode.FIRST, return_dict=True, then=None):
        y = x @ self.weight
        if condition is not None and condition.shift is not None:
            y = y * condition.scale + condition.shift + sum(condition.parts)
        y = then(y) if then is not None else y
        if not return_dict:
            return (y, [None, mode])
        pair = Pair(y * 2, None if mode is Mode.SECOND else Result(sample=y + 1))
        return {"pair": pair, "derived": Derived(y, extra=[pair, torch.float32, 3])}


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return (
            type(a) is type(b)
            and list(a) == list(b)
            and all(equal(a[k], b[k]) for k in a)
            and all(equal(v, vars(b)[k]) for k, v in getattr(a, "__dict__", {}).items())
        )
    if isinstance(a, Result):
        return isinstance(b, Result) and equal(vars(a), vars(b))
    return a == b


SHIFT = torch.linspace(0, 1, 4)


@pytest.mark.parametrize("backend", ["eager", "oracle"])
def test_structured_arguments_and_results_come_back_alike(backend):
    """Every form of call is captured once, and optional arguments may appear later."""
    model, x = GivesMany().eval(), torch.randn(2, 3, 4)
    compiled = pabc.compile(model, pabc.Schedule.pyramid(range(50), full=2), backend=backend)
    forms = [
        {},
        {"return_dict": False},
        {"mode": Mode.SECOND},
        {"condition": Condition(2.0)},
        {"condition": Condition(2.0, SHIFT)},
        {"condition": Condition(2.0, SHIFT, (SHIFT, SHIFT * 2))},
        {"then": torch.relu},
        {"then": torch.relu, "return_dict": False, "mode": Mode.SECOND},
    ]
    for form in forms * 2:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            assert equal(compiled(x, **form), model(x, **form)), form
    assert len(compiled._programs) == len(forms)


def test_no_class_is_registered_with_pytree():
    known = set(torch.utils._pytree.SUPPORTED_NODES)
    capture_call(GivesMany(), {"x": torch.randn(2, 3, 4), "condition": Condition(2.0, SHIFT)})
    assert set(torch.utils._pytree.SUPPORTED_NODES) == known


def test_inputs_of_a_dataclass_are_named_by_its_fields():
    call = {"x": torch.randn(2, 3, 4), "condition": Condition(2.0, SHIFT, (SHIFT,))}
    gm = capture_call(GivesMany(), call)
    names = ("x", "condition_scale", "condition_shift", "condition_parts_0")
    assert gm.meta["signature"].inputs == names


class Holder:
    def __init__(self):
        self.table = {"values": torch.ones(4)}


@pytest.mark.parametrize(
    ("then", "message"),
    [
        ({"names": {1, 2}}, r"argument then\['names'\]: the set is compared by value"),
        (np.ones(3), "argument then: the ndarray is compared by value"),
        ([Holder()], r"argument then\[0\]: the Holder holds tensors"),
        (nn.Linear(1, 1), "argument then: the Linear holds tensors"),
    ],
)
def test_an_argument_that_can_be_no_constant_is_named(then, message):
    compiled = pabc.compile(GivesMany().eval(), SCHEDULE, backend="eager")
    with pytest.raises(TypeError, match=message):
        compiled(torch.randn(2, 3, 4), then=then)


def test_a_result_that_hides_tensors_is_refused():
    class Hides(Small):
        def forward(self, x):
            result = Table()
            result.values = x @ self.weight
            return result

    with pytest.raises(ValueError, match="found a Table that holds tensors"):
        capture_call(Hides(), {"x": torch.randn(2, 3, 4)})


def test_other_strides_in_a_later_call():
    class Reshaping(Small):
        def forward(self, x):
            return (x.reshape(-1, 4) @ self.weight).reshape(x.shape)

    x = torch.randn(2, 3, 4)
    model = Reshaping().eval()
    compiled = pabc.compile(model, SCHEDULE, backend="eager")
    compiled(x)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(compiled(turned), model(turned))


def test_a_model_captured_under_autocast_equals_it_there():
    model, call = CASE.model(), CASE.call()
    compiled = pabc.compile(model, SCHEDULE, backend="eager")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(compiled(**call), model(**call))


def test_capture_needs_no_gradients():
    gm = capture(CASE.model(), (), CASE.call())
    with torch.no_grad():
        assert not run_graph(gm, CASE.call()).requires_grad


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
