"""The context that diffusers' models take around a call, in a loop of one's own."""

from contextlib import ExitStack

import diffusers
import pytest
import torch
from pipelines import build, noise, text

import pabc

pytestmark = pytest.mark.runtime
NUM_STEPS = 6
NAMES = ("cond", "uncond")


def reuse(timesteps):
    masks = {"full": [s % 2 == 1 for s in range(NUM_STEPS)], "cross": [s % 3 > 0 for s in range(6)]}
    return pabc.Schedule.from_masks(timesteps, masks)


def make_scheduler():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(NUM_STEPS)
    return scheduler


def loop(model, where, calls=lambda step: NAMES):
    """Guidance as two calls; `where`: (stack, name, step, scheduler) -> states where a call is."""
    scheduler, latents = make_scheduler(), noise(1, 4, 3, 6, 8)
    for step, t in enumerate(scheduler.timesteps):
        found = []
        for name in calls(step):
            words = text(1, NAMES.index(name))
            with torch.no_grad(), ExitStack() as stack:
                where(stack, name, step, scheduler)
                found.append(model(latents, t.expand(1), words, return_dict=False)[0])
        latents = scheduler.step(sum(found) / len(found), t, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("calls", [lambda step: NAMES, lambda step: NAMES[: 1 + (1 < step < 5)]])
def test_what_a_context_says_places_a_call_as_at_step_does(calls):
    """With all of the keywords, in place: the loop is one that pabc is not named in."""
    model = build("Wan", num_layers=1)

    def in_context(stack, name, step, scheduler):
        where = {"step_index": step, "num_inference_steps": NUM_STEPS}
        where |= {"sigma": scheduler.sigmas[step].item(), "timestep": scheduler.timesteps[step]}
        stack.enter_context(model.cache_context(name, **where))

    plain = loop(model, in_context, calls)
    schedule = reuse(make_scheduler().timesteps)
    other = pabc.compile(model, schedule, backend="eager")
    run = other.trajectory()

    def at_step(stack, name, step, scheduler):
        stack.enter_context(run)
        if name == "cond":
            run.at_step(step)
        stack.enter_context(other.cache_context(name))

    expected = loop(other, at_step, calls)
    fast = pabc.compile(model, schedule, backend="eager", inplace=True)
    for _ in range(2):
        assert torch.equal(loop(model, in_context, calls), expected)
    assert fast.stats.reused == 2 * other.stats.reused > 0
    fast.undo()
    assert fast.stats.nbytes == 0
    assert torch.equal(loop(model, in_context, calls), plain) and not torch.equal(plain, expected)


def test_a_trajectory_and_a_context_state_one_step_or_raise():
    model, schedule = build("Wan", num_layers=1), reuse(make_scheduler().timesteps)
    fast = pabc.compile(model, schedule, backend="eager")

    def both(by):
        def where(stack, name, step, scheduler):
            run = stack.enter_context(trajectory)
            run.at_step(step)
            stack.enter_context(fast.cache_context(name, step_index=step + by))

        return where

    trajectory = fast.trajectory()
    loop(fast, both(0), lambda step: NAMES[:1])
    assert fast.stats.reused > 0
    with pytest.raises(pabc.GuardError, match=r"step_index: expected 0, .*at_step stated, found 1"):
        loop(fast, both(1), lambda step: NAMES[:1])
    assert fast.stats.nbytes == 0


def test_repeated_calls_of_a_stated_step_are_kept_apart():
    """As if each had a model; the second ones begin late, with what the first ones keep."""
    model = build("Wan", num_layers=1)
    scheduler = make_scheduler()
    schedule, latents = reuse(scheduler.timesteps), noise(1, 4, 3, 6, 8)
    fast, first, second = (pabc.compile(model, schedule, backend="eager") for _ in range(3))

    def call(compiled, x, step, **where):
        t = scheduler.timesteps[step].expand(1)
        with torch.no_grad(), compiled.cache_context("cond", step_index=step, **where):
            return compiled(x, t, text(1, 0), return_dict=False)[0]

    for step in range(NUM_STEPS):
        expected = call(first, latents, step)
        assert torch.equal(call(fast, latents, step, repeat=0), expected)
        if not step:
            call(second, latents, step)
            continue
        assert torch.equal(
            call(fast, 2 * latents, step, repeat=1), call(second, 2 * latents, step)
        ), step
        latents = latents - expected / NUM_STEPS
    assert not fast.stats.fallbacks
