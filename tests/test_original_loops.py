"""`backend="original"` in denoising loops: guidance, trajectories, schedules that change, ranks."""

from __future__ import annotations

import threading

import diffusers
import pytest
import torch
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

import pabc

pytestmark = pytest.mark.runtime
COMPUTED = (0, 1, 3, 6)
LINEAR = pabc.Schedule.skip(TIMESTEPS, COMPUTED)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def forward(self, x, t, text=0.0):
        return torch.tanh(self.layer(x)) * t.view(-1, 1, 1) / 1000 + text


def by_hand(model, num_points=2):
    return ForecastByHand(model, COMPUTED, num_points)


@pytest.mark.parametrize("named", [True, False])
def test_two_calls_a_step_are_two_branches(named):
    model = Small().eval()
    fast = skip_calls(model, LINEAR)
    texts = torch.ones(2, 1, 4), torch.zeros(2, 1, 4)
    for _ in range(2):
        hands = by_hand(model), by_hand(model)
        for step in range(len(MASK)):
            if not named:
                fast.current.at_step(step)
            for name, text, hand in zip(("cond", "uncond"), texts, hands, strict=True):
                call = (*step_inputs(step), text)
                with torch.no_grad():
                    if named:
                        with fast.cache_context(name):
                            found = fast(*call)
                    else:
                        found = fast(*call)
                    assert torch.equal(found, hand(*call))
    assert fast.stats.reused == 12 and not fast.stats.fallbacks


def test_a_doubled_batch_is_one_call():
    model = Small().eval()
    fast = skip_calls(model, LINEAR)
    assert_alike(generate(fast, batch=4), generate(by_hand(model), batch=4))
    assert fast.stats.reused == 3


def test_a_generation_that_ends_early_leaves_nothing_to_the_next():
    model = Small().eval()
    fast = skip_calls(model, LINEAR)
    generate(fast, range(3), seed=1)
    assert fast.stats.nbytes
    fast.reset()
    assert not fast.stats.nbytes
    assert_alike(generate(fast), generate(by_hand(model)))
    with fast.trajectory():
        generate(fast, range(2), seed=1)
        assert fast.stats.nbytes
    assert_alike(generate(fast), generate(by_hand(model)))
    assert not fast.stats.fallbacks


def test_a_call_that_raises_ends_its_generation():
    model = Small().eval()
    fast = skip_calls(model, LINEAR)
    generate(fast, range(2))
    with pytest.raises(RuntimeError):
        fast(torch.zeros(2, 6, 5), step_inputs(2)[1])
    assert not fast.stats.nbytes and fast.current.step == 0
    assert_alike(generate(fast), generate(by_hand(model)))


def test_trajectories_in_turns():
    model = Small().eval()
    fast = skip_calls(model, LINEAR)
    seeds = range(3)
    runs = [(fast.trajectory(), by_hand(model)) for _ in seeds]
    for step in range(len(MASK)):
        for seed, (trajectory, hand) in zip(seeds, runs, strict=True):
            with trajectory:
                found = generate(fast, [step], seed=seed)
            assert_alike(found, generate(hand, [step], seed=seed))
    assert fast.stats.reused == 9 and fast.stats.generations == 3


def test_trajectories_in_threads():
    model = Small().eval()
    fast = skip_calls(model, LINEAR)
    found = {}

    def run(seed):
        with fast.trajectory():
            found[seed] = generate(fast, seed=seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert_alike(found[seed], generate(by_hand(model), seed=seed))
    assert not fast.stats.fallbacks and not fast.stats.nbytes


def test_another_schedule_from_the_next_generation_on():
    model = Small().eval()
    fast = skip_calls(model, LINEAR)
    generate(fast, range(2))
    fast.schedule = HOLD
    assert_alike(generate(fast, range(2, 7)), generate(by_hand(model))[2:])
    assert_alike(generate(fast), generate(SkipByHand(model)))
    parabola = pabc.Schedule.skip(TIMESTEPS, COMPUTED, forecast="quadratic")
    with fast.trajectory(parabola):
        assert_alike(generate(fast), generate(by_hand(model, 3)))
    assert fast.plan.depths == (3,)


def test_a_branch_that_begins_late_computes_and_then_forecasts_what_it_can():
    model = Small().eval()
    fast = skip_calls(model, LINEAR)
    calls = {"cond": range(7), "late": range(3, 7)}
    found = {name: [] for name in calls}
    for step in range(7):
        for name, steps in calls.items():
            if step in steps:
                with torch.no_grad(), fast.cache_context(name):
                    found[name].append(fast(*step_inputs(step)))
    assert_alike(found["cond"], generate(by_hand(model)))
    plain = generate(model)
    held = [plain[3], plain[3], plain[3], plain[6]]  # one value is no line
    assert_alike(found["late"], held)
    assert not fast.stats.fallbacks


def test_a_repeated_call_that_begins_late_begins_with_what_the_first_one_keeps():
    """As in Heun's method, which calls the model once in the first step, and twice in others."""
    model = Small().eval()
    fast = skip_calls(model, LINEAR)
    plain = generate(by_hand(model))
    for _ in range(2):
        found = []
        for step in range(7):
            fast.current.at_step(step)
            for repeat in range(1 if step == 0 else 2):
                with torch.no_grad(), fast.cache_context("cond", repeat=repeat):
                    found.append(fast(*step_inputs(step)))
        assert_alike(found[1::2], plain[1:])
        assert_alike(found[2::2], plain[1:])
    assert not fast.stats.fallbacks and fast.stats.nbytes == 0
    fast.current.at_step(0)
    with pytest.raises(TypeError, match="repeat: expected an integer"):
        fast.cache_context("cond", repeat="second")


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_a_second_order_scheduler_lists_a_timestep_for_each_call(name):
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(5)
    timesteps = scheduler.timesteps
    mask = [step % 3 == 2 for step in range(len(timesteps))]
    model = Small().eval()
    fast = skip_calls(model, pabc.Schedule.from_masks(timesteps, {"model": mask}))

    def sample(call):
        scheduler.set_timesteps(5)
        x, found = step_inputs(0)[0], []
        for t in scheduler.timesteps:
            with torch.no_grad():
                found.append(call(x, t.expand(2).float()))
                x = scheduler.step(found[-1], t, x).prev_sample
        return found

    for _ in range(2):
        assert_alike(sample(fast), sample(SkipByHand(model, mask)))
    assert fast.stats.reused == 2 * sum(mask) and not fast.stats.fallbacks


def test_a_step_too_many_and_another_timestep_are_refused():
    fast = skip_calls(Small().eval(), LINEAR)
    generate(fast)
    x, _ = step_inputs(2)
    generate(fast, range(2))
    with pytest.raises(pabc.GuardError, match="expected timestep 600 at step 2, found 350"):
        fast(x, torch.full((2,), 350.0))


def test_calls_that_are_no_steps_are_computed_and_keep_nothing():
    model = Small().eval()
    fast = skip_calls(model, LINEAR)
    generate(fast)
    prefill = step_inputs(0)[0], torch.zeros(2)
    with torch.no_grad():
        assert torch.equal(fast(*prefill), model(*prefill))
    assert fast.stats.outside == 1 and not fast.stats.nbytes
    assert_alike(generate(fast), generate(by_hand(model)))
