"""Calls: how arguments are bound, and structures that come and go as they are."""

import inspect
import warnings
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from generations import compile_eager, make_call, run_alone
from models import ONE_BLOCK, Small, Table, Tiny
from stages import capture_call, facts_of, run_graph
from torch import nn

import pabc
from pabc.base.arguments import bind_arguments
from pabc.passes import Captured, capture

SCHEDULE = pabc.Schedule.pyramid([3, 2, 1], full=2)


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
    model, call = ONE_BLOCK.model(), ONE_BLOCK.call()
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
    assert facts_of(gm)[Captured].signature.inputs == names


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


def test_other_strides_are_no_other_program(tiny_generation):
    """Latents and timesteps that only lie otherwise in memory: copied, and nothing is lost."""
    fast, expected = tiny_generation
    for step in range(5):
        x, t = make_call(0, step)
        turned = x.transpose(0, 1).contiguous().transpose(0, 1) if step % 2 else x
        padded = torch.stack([x, x], -1)[..., 0] if step == 4 else turned
        found = fast(padded, t[:1].expand(2) if step in (0, 3) else t)
        assert torch.allclose(found, expected[step], atol=1e-6, rtol=1e-6)
    assert fast.stats.captures == 1 and fast.stats.reused > 0 and not fast.stats.fallbacks


@pytest.fixture
def tiny_generation():
    model = Tiny().eval()
    return compile_eager(model), run_alone(model, 0)


class Texts(Tiny):
    def forward(self, x, t, texts):
        return super().forward(x + sum(text.mean() for text in texts), t)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda texts: texts[:1], "arguments"),
        (lambda texts: [None, *texts][1:] + [texts[0]], "arguments"),
        (lambda texts: [text[:1] for text in texts], "shape"),
        (lambda texts: [text.double() for text in texts], "dtype"),
    ],
)
def test_fallbacks_have_their_true_reason(change, reason):
    fast, texts = compile_eager(Texts().eval()), [torch.ones(2), torch.ones(2)]
    fast(*make_call(0, 0), texts)
    fast(*make_call(0, 1), change(texts))
    assert fast.stats.fallbacks == {reason: 1}


class Pairs(Small):
    """Takes tensors that may be one, in an argument each, in containers, or the model's own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("a", torch.randn(3, 4))

    def forward(self, x, a, b, more=None):
        y = super().forward(x) + a - 2 * b + 3 * self.a
        return y if more is None else y + 5 * more["c"][0] + 7 * more["d"]


def _one():
    return torch.randn(3, 4)


def _nested(a, b, c, d):
    return {"a": a, "b": b, "more": {"c": [c], "d": d}}


def _same_twice(model):
    one = _one()
    return _nested(one, one, one, one)


def _overlapping(model):
    row = torch.randn(9, 4)
    return _nested(row[:3], row[2:5], row[1:4], row[6:])


def _expanded(model):
    one = torch.randn(1, 4)
    return _nested(*(one.expand(3, 4) for _ in range(4)))


def _weights(model):
    return _nested(model.weight[:3].detach(), model.a, model.a, _one())


@pytest.mark.parametrize("first", [_same_twice, _overlapping, _expanded, _weights])
def test_one_tensor_in_several_arguments_is_several_arguments(first):
    model = Pairs().eval()
    gm, _ = capture(model, (), {"x": torch.randn(3, 4), **first(model)})
    x, *others = (_one() for _ in range(5))
    (found,) = gm(x, *others)
    assert torch.equal(found, model(x, **_nested(*others)))


def test_a_parameter_may_be_called_like_an_input():
    class Named(Small):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4))

        def forward(self, x, scale):
            return super().forward(x) * scale + self.scale

    model, call = Named().eval(), {"x": torch.randn(3, 4), "scale": torch.randn(4)}
    gm, _ = capture(model, (), call)
    gm.graph.lint()
    assert torch.equal(run_graph(gm, call), model(**call))


@pytest.mark.parametrize("fails", [False, True])
def test_tensors_of_the_user_have_no_marks_after_a_trace(fails):
    class Plain(Small):
        def forward(self, x):
            if fails and isinstance(x.shape[0], torch.SymInt):
                raise RuntimeError("sizes must be known")
            return super().forward(x)

    model, x = Plain().eval(), torch.randn(3, 4)
    before = dict(vars(x))
    with pytest.raises(ValueError, match="must be known") if fails else nullcontext():
        capture(model, (), {"x": x}, dynamic=True)
    assert vars(x) == before
    capture(model, (), {"x": x})
    assert vars(x) == before
