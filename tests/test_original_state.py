"""`backend="original"`: what makes kept results invalid, and models that keep state."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from skipping import (
    HOLD,
    MASK,
    ForecastByHand,
    SkipByHand,
    assert_alike,
    copy,
    generate,
    skip_calls,
    step_inputs,
)
from torch import nn

import pabc

pytestmark = pytest.mark.runtime


class Small(nn.Module):
    """A linear model with a flag, and numbers among its arguments."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.is_doubled = False

    def forward(self, x, t, scale=1.0, **more):
        return self.layer(x) * self.factor(t) * scale * (2 if self.is_doubled else 1)

    def factor(self, t):
        return t.view(-1, 1, 1) / 1000 if isinstance(t, torch.Tensor) else t / 1000


# ---- state that a skipped call would not leave ----


class Counting(Small):
    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, x, t):
        self.count += 1
        return super().forward(x, t)


class Residual(Small):
    """Like the caches that add what the last call changed."""

    def __init__(self):
        super().__init__()
        self.kept = SimpleNamespace(residual=None)

    def forward(self, x, t):
        y = super().forward(x, t)
        self.kept.residual = y - x
        return y


class Cached(Small):
    """With keys and values in a buffer, written in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("keys", torch.zeros(2, 6, 4))

    def forward(self, x, t):
        self.keys.lerp_(x, 0.5)
        return super().forward(x, t) + self.keys


class Growing(Small):
    def __init__(self):
        super().__init__()
        self.layer.seen = []

    def forward(self, x, t):
        self.layer.seen.append(x)
        return super().forward(x, t)


class Replacing(Cached):
    def forward(self, x, t):
        self.keys = 0.5 * self.keys + x
        return Small.forward(self, x, t) + self.keys


STATEFUL = {
    Counting: "count, from 1 to 2",
    Residual: r"kept.residual, from a tensor of shape \(2, 6, 4\) to a tensor",
    Cached: "keys;",
    Growing: r"layer.seen\[1\], from nothing",
    Replacing: "keys, from a tensor",
}


@pytest.mark.parametrize("model", STATEFUL)
def test_a_model_that_keeps_state_is_refused_by_name(model):
    fast = skip_calls(model().eval())
    message = f"{model.__name__}: expected calls that leave nothing behind.*{STATEFUL[model]}"
    with pytest.raises(ValueError, match=message):
        generate(fast)
    assert fast.stats.calls == 1 and fast.stats.nbytes == 0


def test_a_model_that_keeps_state_runs_where_nothing_is_skipped():
    model, plain = Counting().eval(), Counting().eval()
    assert_alike(generate(skip_calls(model, pabc.Schedule.none(HOLD.timesteps))), generate(plain))
    assert model.count == plain.count


class Memory:
    """A cache that is passed as an argument."""

    def __init__(self):
        self.values = []


class Remembering(Small):
    def forward(self, x, t, memory):
        memory.values.append(float(x.mean()))
        return super().forward(x, t) + sum(memory.values)


def test_state_in_an_argument_is_refused_by_name():
    fast = skip_calls(Remembering().eval())
    memory = Memory()
    with pytest.raises(ValueError, match=r"argument memory.values\[1\], from nothing"):
        generate(lambda x, t: fast(x, t, memory))


class Lazy(Small):
    """Builds a table at its first call of each size, and notes the size each time."""

    def __init__(self):
        super().__init__()
        self.tables, self.shape, self.last = {}, None, None

    def forward(self, x, t):
        size = x.shape[1]
        self.shape = tuple(x.shape)
        if size not in self.tables:
            self.tables[size] = torch.arange(size).view(-1, 1)
        self.last = self.tables[size] * 1.0
        return super().forward(x, t) + self.last


def test_tables_that_are_built_once_cost_one_step():
    mask = (False, True, True, True, False, True, True)
    schedule = pabc.Schedule.from_masks(HOLD.timesteps, {"model": mask})
    model, plain = Lazy().eval(), Lazy().eval()
    fast = skip_calls(model, schedule)
    expected = generate(SkipByHand(plain, (False, False, *mask[2:])))
    assert_alike(generate(fast), expected)
    assert dict(fast.stats.fallbacks) == {"state": 1}
    assert_alike(generate(fast), generate(SkipByHand(plain, mask)))
    found = generate(fast, tokens=9)  # which builds another table
    assert_alike(found, generate(SkipByHand(plain, (False, False, *mask[2:])), tokens=9))
    assert dict(fast.stats.fallbacks) == {"state": 2}


SEEN: list[int] = []


@pytest.mark.parametrize("is_global", [False, True])
def test_hooks_that_look_on_may_keep_what_they_see(is_global):
    model, seen = Small().eval(), SEEN if is_global else []
    model.layer.register_forward_hook(
        (lambda *_: SEEN.append(len(SEEN))) if is_global else (lambda *_: seen.append(len(seen)))
    )
    fast = skip_calls(model)
    for _ in range(2):
        assert_alike(generate(fast), generate(SkipByHand(Small().eval())))
    assert seen == list(range(2 * MASK.count(False))) and not fast.stats.fallbacks


@pytest.mark.parametrize("writes", [False, True])
def test_hooks_that_keep_something_and_take_part_are_refused(writes):
    model, seen = Small().eval(), []

    def take_part(module, args, result):
        seen.append(result)
        if not writes:
            return result * 2
        result.mul_(2)

    model.layer.register_forward_hook(take_part)
    fast = skip_calls(model)
    with pytest.raises(
        ValueError, match=r"changes layer.hook .*take_part: seen\[1\], from nothing"
    ):
        generate(fast)
    assert list(model.layer._forward_hooks.values()) == [take_part]


# ---- what makes kept values invalid ----


def run(call, before=lambda step: None, more=lambda step: {}):
    """A generation; `before` is called before each step, `more` gives further arguments."""
    found = []
    for step in range(len(MASK)):
        before(step)
        with torch.no_grad():
            found.append(copy(call(*step_inputs(step), **more(step))))
    return found


def computing(*steps):
    """The mask in a generation in which these steps cannot reuse."""
    return tuple(skipped and step not in steps for step, skipped in enumerate(MASK))


def flag(model):
    model.is_doubled = True


def hook(model):
    model.layer.register_forward_hook(lambda module, args, result: result + 1)


def replace_weight(model):
    model.layer.weight = nn.Parameter(model.layer.weight.detach() * 2)


def assign_weights(model):
    weights = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)


def replace_module(model):
    torch.manual_seed(1)
    model.layer = nn.Linear(4, 4)


def replace_method(model):
    model.factor = lambda t: 3.0


CHANGES = {
    flag: "model",
    hook: "model",
    replace_weight: "weights",
    assign_weights: "weights",
    replace_module: "model",
    replace_method: "model",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_follows_from_another_model_is_not_reused(change):
    model, plain = Small().eval(), Small().eval()
    fast = skip_calls(model)
    found = run(fast, lambda step: step == 5 and change(model))
    expected = run(SkipByHand(plain, computing(5)), lambda step: step == 5 and change(plain))
    assert_alike(found, expected)
    assert dict(fast.stats.fallbacks) == {CHANGES[change]: 1}
    assert_alike(run(fast), run(SkipByHand(plain)))
    assert dict(fast.stats.fallbacks) == {CHANGES[change]: 1}


@pytest.mark.parametrize("kind", [Small, Lazy])
def test_a_flag_that_is_set_for_one_of_two_calls_a_step(kind):
    model, plain = kind().eval(), kind().eval()
    fast = skip_calls(model, pabc.Schedule.skip(HOLD.timesteps, (0, 1, 3, 6)))
    by_hand = [ForecastByHand(plain, (0, 1, 3, 6), 2) for _ in range(2)]
    for step in range(len(MASK)):
        for which, name in enumerate(("cond", "uncond")):
            model.is_doubled = plain.is_doubled = bool(which)
            with torch.no_grad(), fast.cache_context(name):
                found = fast(*step_inputs(step))
                assert torch.equal(found, by_hand[which](*step_inputs(step)))
    assert not fast.stats.fallbacks and fast.stats.reused == 6


ARGUMENTS = {
    "scale": lambda step: {"scale": 1.0 if step < 5 else 0.5},
    "flag": lambda step: {"is_masked": step >= 5},
    "another": lambda step: {"note": "b"} if step >= 5 else {},
    "nested": lambda step: {"note": {"scale": step >= 5}},
    "tensor": lambda step: {"mask": torch.zeros(2 if step < 5 else 3)},
    "dtype": lambda step: {"mask": torch.zeros(2, dtype=torch.half if step < 5 else None)},
}
REASONS = {"tensor": "shape", "dtype": "dtype"}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_what_follows_from_other_arguments_is_not_reused(name):
    model, more = Small().eval(), ARGUMENTS[name]
    fast = skip_calls(model)
    expected = run(SkipByHand(model, computing(5)), more=more)
    assert_alike(run(fast, more=more), expected)
    assert dict(fast.stats.fallbacks) == {REASONS.get(name, "arguments"): 1}


def test_another_size_in_mid_generation_is_not_reused():
    model = Small().eval()
    fast, by_hand = skip_calls(model), SkipByHand(model, computing(5))
    for step in range(len(MASK)):
        call = step_inputs(step, tokens=6 if step < 5 else 9)
        with torch.no_grad():
            assert torch.equal(fast(*call), by_hand(*call))
    assert dict(fast.stats.fallbacks) == {"shape": 1}


def test_autocast_in_mid_generation_is_another_call():
    model = Small().eval()
    fast, by_hand = skip_calls(model), SkipByHand(model, computing(5))
    for step in range(len(MASK)):
        with torch.no_grad(), torch.autocast("cpu", enabled=step >= 5):
            assert_alike([fast(*step_inputs(step))], [by_hand(*step_inputs(step))])
    assert dict(fast.stats.fallbacks) == {"arguments": 1}


@pytest.mark.parametrize("named", [True, False])
def test_numbers_that_move_with_the_steps_are_no_other_arguments(named):
    schedule = HOLD if named else pabc.Schedule.from_masks(range(7), {"model": MASK})
    model = Small().eval()
    fast = skip_calls(model, schedule)
    for _ in range(2):
        found, by_hand = [], SkipByHand(model)
        for step, timestep in enumerate(HOLD.timesteps):
            x, _ = step_inputs(step)
            with torch.no_grad():
                found.append(torch.equal(fast(x, timestep), by_hand(x, timestep)))
        assert all(found)
    assert not fast.stats.fallbacks and fast.stats.reused == 6


def test_a_number_that_is_the_timestep_moves_from_the_first_step_on():
    mask = (False, True, False, True, False, True, False)
    model = Small().eval()
    fast = skip_calls(model, pabc.Schedule.from_masks(HOLD.timesteps, {"model": mask}))
    by_hand = SkipByHand(model, mask)
    for step, timestep in enumerate(HOLD.timesteps):
        x, _ = step_inputs(step)
        with torch.no_grad():
            assert torch.equal(fast(x, timestep), by_hand(x, timestep))
    assert not fast.stats.fallbacks


def test_results_of_another_size_are_not_added_up():
    class Shrinking(Small):
        def forward(self, x, t):
            return super().forward(x, t)[:, : 3 if t[0] > 600 else 6]

    model = Shrinking().eval()
    fast = skip_calls(model, pabc.Schedule.skip(HOLD.timesteps, (0, 1, 3, 6)))
    found, plain = generate(fast), generate(model)
    assert_alike(found[4:6], [plain[3], plain[3]])
    assert_alike(found[2:3], [2 * plain[1] - plain[0]])
