"""Guards: calls, timesteps and values that contradict the plan, and what is warned of."""

import functools
import re
import warnings

import pytest
import torch
from generations import (
    SCHEDULE,
    TIMESTEPS,
    assert_equal,
    compile_eager,
    generate,
    make_call,
    run_alone,
)
from models import Tiny

import pabc
from pabc.runtime import timesteps

pytestmark = pytest.mark.runtime


@pytest.fixture
def model():
    return Tiny().eval()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, t: (x[:, :4], t), "shape"),
        (lambda x, t: (x, t.half()), "dtype"),
    ],
)
def test_a_call_unlike_the_last_computes_and_is_counted(model, change, reason, caplog):
    fast = compile_eager(model)
    for step in (0, 1, 2, 3):
        call = make_call(0, step)
        call = change(*call) if step in (1, 3) else call
        assert torch.equal(fast(*call), model(*call))
    assert fast.stats.fallbacks == {reason: 3}
    assert fast.stats.calls == 4 and fast.stats.reused == 0
    assert len([r for r in caplog.records if reason in r.getMessage()]) == 1, "logged once"


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((0, 0), r"timestep 700 at step 1, found 900, that of step 0 again.*cache_context"),
        ((0, 1, 3), r"timestep 500 at step 2, found 300, that of step 3"),
        ((0, 1, 2, 0), r"timestep 300 at step 3, found 900, that of step 0.*reset"),
        ((2, 3), r"timestep 700 at step 1, found 300, that of step 3"),
        ((0, 2), r"timestep 700 at step 1, found 500, that of step 2"),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_a_timestep_of_another_step_is_an_error(model, steps, message, scale):
    fast = compile_eager(model)
    if scale != 1:
        message = r"expected timestep 0\.[1-9] at step \d, found 0\.[1-9], that of step \d"
    *others, (x, t) = [make_call(0, step) for step in steps]
    for x_before, t_before in others:
        fast(x_before, t_before * scale)
    with pytest.raises(pabc.GuardError, match=message):
        fast(x, t * scale)
    assert fast.stats.nbytes == 0
    assert_equal(generate(fast, 0), run_alone(model, 0))


def test_other_timesteps_than_the_schedules_are_an_error(model):
    fast = compile_eager(model)
    x, t = make_call(0, 0)
    fast(x, t)
    with pytest.raises(pabc.GuardError, match="found 880, no step's: make the schedule from"):
        fast(x, torch.full((2,), 880.0))


@pytest.mark.parametrize(
    "values",
    [
        [0.5] * 5,
        [0.0] * 5,
        list(torch.linspace(1, 0.2, 5)),
        [900.25, 700.5, 500.125, 300.0, 100.9],
    ],
)
def test_other_numbers_are_not_taken_for_timesteps(model, values):
    schedule = pabc.Schedule.pyramid([900.25, 700.5, 500.125, 300.0, 100.9], full=2)
    if values[0] == 1:
        schedule = pabc.Schedule.pyramid(range(5), full=2)
    fast = compile_eager(model, schedule)
    for value in values:
        t = torch.full((2,), float(value))
        fast(make_call(0, 0)[0], t.long() if value == 900.25 else t)
    assert fast.stats.generations == 1


def test_a_timestep_on_its_way_from_the_device_is_looked_at_one_call_later(model, monkeypatch):
    """As on a GPU; here, what is copied is at hand, and said not to be."""
    read = timesteps.read
    monkeypatch.setattr(timesteps, "read", lambda leaf: functools.partial(read, leaf))
    fast = compile_eager(model)
    assert_equal(generate(fast, 0), run_alone(model, 0))
    for step in (0, 1, 3):
        fast(*make_call(0, step))
    with pytest.raises(pabc.GuardError, match="timestep 500 at step 2, found 300, that of step 3"):
        fast(*make_call(0, 4))
    assert_equal(generate(fast, 1), run_alone(model, 1))


class Guided(Tiny):
    def forward(self, x, guidance, t):
        return super().forward(x, t + guidance)


def test_a_constant_that_is_like_the_first_timestep(model):
    """A guidance scale of 1 beside noise levels from 1."""
    levels = (1.0, 0.8, 0.5, 0.1)
    fast = compile_eager(Guided().eval(), pabc.Schedule.pyramid(levels, full=2))
    x, _ = make_call(0, 0)
    guidance = torch.ones(2)
    for level in levels:
        fast(x, guidance, torch.full((2,), level))
    assert fast.stats.generations == 1
    fast = compile_eager(Guided().eval(), pabc.Schedule.pyramid(levels, full=2))
    for level in levels:  # the timestep is spelled in no known way
        fast(x, guidance, torch.full((2,), level**2 + 2))
    assert fast.stats.generations == 1


def test_more_calls_than_steps_start_a_new_generation_unless_stated(model):
    fast = compile_eager(model)
    with fast.trajectory() as run:
        run.at_step(5)
        with pytest.raises(pabc.GuardError, match=r"expected a step below 5.*found 5"):
            fast(*make_call(0, 4))


def test_nan_does_not_enter_a_slot_where_checking_is_asked_for(model):
    fast = compile_eager(model, check_finite=True)
    x, t = make_call(0, 0)
    with pytest.raises(pabc.GuardError, match=r"NaN or infinity in the full.*'blocks\.0.*step 0"):
        fast(x.fill_(torch.nan), t)
    assert fast.stats.nbytes == 0
    assert_equal(generate(fast, 0), run_alone(model, 0))


def test_a_generation_without_reuse_warns(model):
    fast = compile_eager(model)
    for step in range(4):
        fast(*make_call(0, step, tokens=4 + step % 2))
    with pytest.warns(UserWarning, match="nothing was reused in a whole generation"):
        fast(*make_call(0, 4, tokens=4))
    assert fast.stats.fallbacks["shape"] > 0


@pytest.mark.parametrize(
    "schedule", [SCHEDULE, pabc.Schedule.none(TIMESTEPS)], ids=["pyramid", "none"]
)
def test_no_warning_where_reuse_works_or_is_not_asked_for(model, schedule):
    fast = compile_eager(model, schedule)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        generate(fast, 0)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (pabc.Schedule.pyramid(TIMESTEPS, temporal=2), "'temporal', which .*nothing can be reused"),
        (SCHEDULE.override(kind="full", every=1).override(kind="mlp", every=1), "take back what"),
    ],
)
def test_a_schedule_that_can_reuse_nothing_is_warned_of_once(model, schedule, message):
    fast = compile_eager(model, schedule)
    with warnings.catch_warnings(record=True) as warned, torch.no_grad():
        warnings.simplefilter("always")
        for tokens in (6, 6, 4):
            generate(fast, 0, tokens)
    assert len(warned) == 1 and re.search(message, str(warned[0].message))


def test_gradients_that_only_weights_want_are_warned_of_once(model):
    fast = compile_eager(model)
    with pytest.warns(UserWarning, match="no grad_fn") as warned:
        assert all(x.grad_fn is None for x in generate(fast, 0))
    assert len(warned) == 1
    fast = compile_eager(Tiny().eval().requires_grad_(False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(fast, 0)
