"""`backend="original"`: results, plans and options of a model that is called as it is."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from skipping import (
    HOLD,
    MASK,
    TIMESTEPS,
    ForecastByHand,
    SkipByHand,
    assert_alike,
    generate,
    skip_calls,
    step_inputs,
)
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils import _pytree as pytree

import pabc

pytestmark = pytest.mark.runtime


class Small(nn.Module):
    """A model without attention, with a result in some container."""

    def __init__(self, pack=lambda y: y):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)
        self.pack = pack
        self.num_calls = [0]

    def forward(self, x, t, scale=1.0, flag=False):
        y = torch.tanh(self.first(x)) * t.view(-1, 1, 1) / 1000
        return self.pack(self.second(y) * scale * (2 if flag else 1))


@dataclass
class Found:
    sample: torch.Tensor
    note: str


PACKS = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, y.mean(1)),
    "dict": lambda y: {"sample": y, "sizes": [y.shape[0], "rows"]},
    "output": lambda y: Transformer2DModelOutput(sample=y),
    "repeated": lambda y: [y, y],
    "view": lambda y: (y, y[0]),
    "none": lambda y: (None, y.bool(), y.long()),
}


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_a_skipped_call_gives_what_the_last_one_gave(pack):
    model = Small(pack).eval()
    fast = skip_calls(model)
    for _ in range(2):
        assert_alike(generate(fast), generate(SkipByHand(model)))
    stats = fast.stats
    assert (stats.computed, stats.reused, stats.stored) == (8, 6, 4) and not stats.fallbacks
    assert stats.nbytes == 0 and stats.generations == 2 and stats.captures == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("forecast", "num_points"), [("hold", 1), ("linear", 2), ("quadratic", 3)])
def test_a_skipped_call_is_forecast(forecast, num_points, dtype):
    computed = (0, 1, 3, 6)
    schedule = pabc.Schedule.skip(TIMESTEPS, computed, forecast=forecast)
    model = Small(lambda y: y.to(dtype)).eval()
    fast = skip_calls(model, schedule)
    for _ in range(2):
        assert_alike(generate(fast), generate(ForecastByHand(model, computed, num_points)))
    assert fast.stats.reused == 6 and not fast.stats.fallbacks
    assert fast.stats.peak_nbytes == fast.plan.peak_bytes
    if forecast != "hold":
        assert "~" in str(fast.plan)


@pytest.mark.parametrize("seed", range(20))
def test_random_schedules_are_followed(seed):
    rng = random.Random(seed)
    computed = [0, *sorted(rng.sample(range(1, 7), rng.randrange(6)))]
    forecast, num_points = rng.choice([("hold", 1), ("linear", 2), ("quadratic", 3)])
    schedule = pabc.Schedule.skip(TIMESTEPS, computed, forecast=forecast)
    model = Small(PACKS[rng.choice(["tensor", "tuple", "dict", "output"])]).eval()
    plain = Small().eval()
    fast = skip_calls(model, schedule)
    for _ in range(2):
        found = [pytree.tree_leaves(each)[0] for each in generate(fast)]
        assert_alike(found, generate(ForecastByHand(plain, computed, num_points)))
    assert fast.stats.reused == 2 * (7 - len(computed)) and not fast.stats.nbytes


def test_what_is_no_floating_point_number_is_held():
    model = Small(lambda y: (y, (100 * y).long(), y > 0)).eval()
    fast = skip_calls(model, pabc.Schedule.skip(TIMESTEPS, (0, 1, 3, 6)))
    held = skip_calls(model, pabc.Schedule.skip(TIMESTEPS, (0, 1, 3, 6), forecast="hold"))
    for mine, theirs in zip(generate(fast), generate(held), strict=True):
        assert_alike(mine[1:], theirs[1:])


def test_weights_are_followed_where_they_fit():
    rows = [[1.0, 0.0]] * 4 + [[1.5, -0.25]] * 3
    schedule = pabc.Schedule.skip(TIMESTEPS, (0, 1, 3, 6), forecast=rows)
    model = Small().eval()
    fast = skip_calls(model, schedule)
    found, all_steps = generate(fast), generate(model)
    assert torch.equal(found[4], 1.5 * all_steps[3] - 0.25 * all_steps[1])
    assert torch.equal(found[2], all_steps[1] + 0 * all_steps[0])


def test_a_dataclass_is_rebuilt():
    model = Small(lambda y: Found(y, "note")).eval()
    fast = skip_calls(model)
    found, expected = generate(fast), generate(SkipByHand(lambda *a: model(*a).sample))
    assert all(type(each) is Found and each.note == "note" for each in found)
    assert_alike([each.sample for each in found], expected)


def test_what_is_kept_shares_no_memory_with_anything():
    """Neither with what the caller gets, and may write to, nor with what he passed."""
    model = Small(lambda y: (y, y)).eval()
    fast, by_hand = skip_calls(model), SkipByHand(model)
    for step in range(len(MASK)):
        x, t = step_inputs(step)
        with torch.no_grad():
            found, expected = fast(x, t), by_hand(x, t)
        assert_alike([found], [expected])
        for tensor in (*found, x, t):
            tensor.fill_(-1)


def test_an_output_that_is_an_input_is_that_of_the_same_call():
    class Passing(Small):
        def forward(self, x, t):
            return super().forward(x, t), x

    fast = skip_calls(Passing().eval())
    for step in range(len(MASK)):
        x, t = step_inputs(step)
        with torch.no_grad():
            assert fast(x, t)[1] is x
    assert fast.stats.reused == 3 and fast.stats.peak_nbytes == x.nbytes


def test_a_model_that_writes_to_its_inputs_warns_once_and_skipped_steps_do_not_write():
    class Writing(Small):
        def forward(self, x, t):
            return (super().forward(x, t), x.mul_(2))

    fast = skip_calls(Writing().eval())
    with pytest.warns(UserWarning, match=r"Writing writes to its input .*0.*; steps that skip"):
        generate(fast)
    latents = []
    for step in range(len(MASK)):
        x, t = step_inputs(step)
        with torch.no_grad():
            found = fast(x, t)
        latents.append(x)
        source = 1 if step == 2 else 3 if step in (4, 5) else step
        assert torch.equal(found[1], 2 * step_inputs(source)[0]), "it is a result as well"
    written = [not torch.equal(x, step_inputs(step)[0]) for step, x in enumerate(latents)]
    assert written == [not skipped for skipped in MASK]


def test_tensors_that_hide_in_an_object_are_refused():
    class Hiding:
        def __init__(self, y):
            self.sample = y

    fast = skip_calls(Small(Hiding).eval())
    with pytest.raises(ValueError, match="found a Hiding that holds tensors"):
        generate(fast)


@pytest.mark.parametrize(
    ("wrap", "found"),
    [
        (lambda y: y.numpy(), "ndarray"),
        (lambda y: {"sample": y, "raw": {y}}, "set"),
        (lambda y: (part for part in [y]), "generator"),
        (lambda y: lambda: y, "function"),
    ],
    ids=["array", "set", "generator", "function"],
)
@torch.no_grad()
def test_results_that_cannot_be_forecast_are_refused(wrap, found):
    class Wrapped(torch.nn.Module):
        def forward(self, x, t):
            return wrap(x * t)

    fast = pabc.compile(Wrapped().eval(), pabc.Schedule.skip((3, 2, 1), [0, 1]), backend="original")
    with pytest.raises(ValueError, match=f"found a {found}"):
        fast(torch.ones(2), torch.tensor(3.0))


OTHERS = {
    "kind": pabc.Schedule.from_masks(TIMESTEPS, {"model": MASK, "cross": MASK}),
    "layer": HOLD.override(name="blocks.*", mask=MASK),
    "override": pabc.Schedule.none(TIMESTEPS).override(kind="mlp", layers=0, every=2),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_schedules_of_what_is_within_the_model_are_refused(other):
    message = r"schedule: expected only kind 'model' with backend='original', found (kind|override)"
    model = Small().eval()
    with pytest.raises(ValueError, match=message):
        skip_calls(model, other)
    fast = skip_calls(model)
    with pytest.raises(ValueError, match=message):
        fast.schedule = other
    with pytest.raises(ValueError, match=message):
        fast.trajectory(other)
    assert fast.schedule == HOLD


def test_overrides_of_the_call_are_followed():
    mask = (False, True, True, True, False, False, True)
    model = Small().eval()
    fast = skip_calls(model, HOLD.override(name="model", mask=mask))
    assert_alike(generate(fast), generate(SkipByHand(model, mask)))
    with pytest.warns(UserWarning, match="nothing can be reused"):
        fast.schedule = HOLD.override(kind="model", every=1)
    assert_alike(generate(fast), generate(model))
    fast.schedule = HOLD
    assert_alike(generate(fast), generate(SkipByHand(model)))


REFUSED = {
    "cut": "branch",
    "kinds": {"first": "mlp"},
    "latents": "x",
    "dynamic": True,
    "cudagraphs": True,
    "kernels": "force",
    "disable": ("hoist",),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_of_graphs_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name}: expected .* with backend='original'.*found"):
        skip_calls(Small().eval(), **{name: REFUSED[name]})


@pytest.mark.usefixtures("process_group")
def test_a_mesh_is_refused():
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    with pytest.raises(ValueError, match=r"mesh: expected None with backend='original'"):
        skip_calls(Small().eval(), mesh=mesh)


@pytest.mark.parametrize(("dtype", "nbytes"), [("keep", 192), ("bf16", 96), ("fp8", 96)])
def test_results_are_kept_in_a_smaller_form(dtype, nbytes):
    model = Small().eval()
    fast = skip_calls(model, cache_dtype=dtype, offload="cpu")
    found, expected = generate(fast), generate(SkipByHand(model))
    for step, skipped in enumerate(MASK):
        close = {"keep": 0, "bf16": 2**-8, "fp8": 2**-4}[dtype] if skipped else 0
        torch.testing.assert_close(found[step], expected[step], rtol=close, atol=0.01 * close)
    assert fast.stats.peak_nbytes == nbytes == fast.plan.peak_bytes


def test_a_memory_budget_without_room_is_refused():
    fast = skip_calls(Small().eval(), memory_budget=191)
    with pytest.raises(ValueError, match=r"memory_budget: expected 192 bytes .* found 191"):
        generate(fast)
    fast = skip_calls(Small().eval(), memory_budget=192)
    generate(fast)
    assert fast.stats.reused == 3


def test_values_that_are_not_finite_are_not_kept():
    model = Small().eval()
    fast = skip_calls(model, check_finite=True)
    generate(fast)
    nn.init.constant_(model.second.bias, float("nan"))
    with pytest.raises(pabc.GuardError, match=r"found NaN or infinity in the model .* at step 1"):
        generate(fast)
    assert fast.stats.nbytes == 0


def test_what_is_told_of_the_model(tmp_path):
    fast = skip_calls(Small().eval(), example_inputs=(step_inputs(0), {}))
    assert fast.plan.reuse.sum() == 3 and fast.plan.slots[0].name == "model"
    generate(fast)
    found = fast.explain()
    assert "called as it is, and nothing within it is captured; backend=" in str(found)
    assert str(fast.plan) in str(found) and fast.plan.peak_bytes == 192
    assert fast.phases == () and not found.attention
    fast.dump(tmp_path / "dump")
    assert pabc.Plan.from_json((tmp_path / "dump" / "plan.json").read_text()) == fast.plan
    with pytest.raises(pabc.ArtifactError, match="found 'original'"):
        fast.save(tmp_path / "file")


def test_a_call_is_what_it_is_for_its_caller():
    """Autocast, gradients and inference mode are as they are around the call."""
    model = Small().eval()
    fast = skip_calls(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = generate(fast)
        assert_alike(found, generate(SkipByHand(model)))
    assert found[0].dtype is torch.bfloat16
    with torch.inference_mode():
        assert generate(fast)[0].is_inference()
    assert_alike(generate(fast), generate(SkipByHand(model)))
    with pytest.warns(UserWarning, match="results of skipped calls have no grad_fn"):
        found = [fast(*step_inputs(step)) for step in range(len(MASK))]
    assert [each.grad_fn is None for each in found] == list(MASK)
    with pytest.raises(RuntimeError, match="requires grad"):
        fast(step_inputs(0)[0].requires_grad_(), step_inputs(0)[1])
    with pytest.raises(RuntimeError, match="found training mode"):
        skip_calls(Small())(*step_inputs(0))


def test_hooks_run_where_the_model_does(request):
    model = Small().eval()
    counts = [itertools.count() for _ in range(3)]
    model.register_forward_pre_hook(lambda _, args: (args[0] * 2, args[1]))
    model.register_forward_hook(lambda *_: tell(0))
    model.first.register_forward_hook(lambda *_: tell(1))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: tell(2))
    request.addfinalizer(handle.remove)

    def tell(which):
        next(counts[which])

    fast = skip_calls(model)
    found = generate(fast)
    assert [next(count) for count in counts] == [4, 4, 12]
    assert_alike(found, generate(SkipByHand(model)))


def test_in_place_the_model_calls_itself_once():
    model, plain = Small().eval(), Small().eval()
    count = itertools.count()

    def tell(*_):
        next(count)

    model.register_forward_hook(tell)
    fast = skip_calls(model, inplace=True)
    for _ in range(2):
        assert_alike(generate(model), generate(SkipByHand(plain)))
    assert next(count) == 2 * MASK.count(False) and fast.stats.calls == 2 * len(MASK)
    fast.undo()
    assert_alike(generate(model), generate(plain))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("around", [False, True])
def test_a_module_that_dynamo_compiled_is_called_compiled(around, inplace):
    counter = CompileCounter()
    model, plain = Small().eval(), Small().eval()
    if around:
        model = torch.compile(model, backend=counter)
    else:
        model.compile(backend=counter)
    fast = skip_calls(model, inplace=inplace)
    for _ in range(2):
        assert_alike(generate(model if inplace else fast), generate(SkipByHand(plain)))
    assert counter.frame_count == 1 and not fast.stats.fallbacks and fast.stats.reused == 6
    fast.undo()
    assert_alike(generate(model), generate(plain))
    assert counter.frame_count == 1
