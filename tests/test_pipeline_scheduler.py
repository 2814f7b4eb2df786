"""The scheduler of a compiled pipeline: wrapped, followed, and what tells the step that runs."""

import copy
import inspect

import diffusers
import pytest
import torch
from loops import (
    ALL_STEPS,
    Loop,
    compile_eager,
    loop_by_hand,
    loop_call,
    loop_masks,
    loop_schedule,
    make_loop,
)

import pabc
from pabc.pipelines.scheduler import index_of

pytestmark = pytest.mark.runtime


@pytest.fixture
def loop():
    return make_loop()


@pytest.mark.parametrize("start", [2, 3])
@pytest.mark.parametrize("tells", ["begin_index", "scale_model_input", "step"])
def test_a_loop_that_begins_later_has_a_schedule_of_its_own_steps(loop, start, tells):
    class Silent(diffusers.DDIMScheduler):
        def scale_model_input(self, sample, *unnamed):
            return sample

    if tells != "begin_index":
        loop.scheduler = Silent() if tells == "step" else diffusers.DDIMScheduler()
    call, ran = loop_call(), 7 - start
    masks = loop_masks(ran)
    if tells == "step":  # known after the first step: the second one computes
        masks = {kind: [False, False, *mask[2:]] for kind, mask in masks.items()}
    where = ALL_STEPS[: 2 * ran]
    expected = loop_by_hand(loop, where, 7, *call, start=start, masks=masks)
    with compile_eager(loop) as fast:
        assert torch.equal(fast(7, *call, start=start), expected)
        assert fast.models["transformer"].plan.num_steps == ran
        assert not fast.models["transformer"].stats.fallbacks


def test_wrapped_methods_stay_methods_of_their_scheduler(loop):
    scheduler = loop.scheduler
    plain = inspect.signature(scheduler.set_timesteps), inspect.signature(scheduler.step)
    with compile_eager(loop):
        assert (
            inspect.signature(scheduler.set_timesteps),
            inspect.signature(scheduler.step),
        ) == plain
        scheduler.set_timesteps(4)
        copied = copy.deepcopy(scheduler)
        copied.set_timesteps(7)
        copied.step(torch.zeros(1), copied.timesteps[0], torch.zeros(1))
        assert (len(scheduler.timesteps), scheduler.step_index) == (4, None)
        assert (len(copied.timesteps), copied.step_index) == (7, 1)
    assert "step" not in vars(scheduler)


def test_index_of_a_timestep():
    timesteps = torch.tensor([9.0, 7.0, 7.0, 5.0, 5.0])
    for place, view in enumerate(timesteps[1:]):
        assert index_of(view, timesteps, 0) == index_of(view[None], timesteps, 0) == place + 1
    assert [index_of(7.0, timesteps, expected) for expected in range(4)] == [1, 1, 2, 1]
    assert index_of(torch.tensor(5), timesteps, 4) == 4
    assert index_of(6.0, timesteps, 0) is None and index_of(None, timesteps, 0) is None
    assert index_of(torch.zeros(2), timesteps, 0) is None
    far = timesteps.to("meta")  # not at hand, as on an accelerator
    assert [index_of(view, far, 0) for view in far] == [0, 1, 2, 3, 4]
    assert index_of(torch.tensor(5, device="meta"), far, 0) is None
    assert index_of(5.0, far, 0) is None


def test_a_replaced_scheduler_is_followed(loop):
    call, plain_model = loop_call(), copy.deepcopy(loop.transformer)
    with compile_eager(loop) as fast:
        fast(6, *call)
        for scheduler in (diffusers.DDIMScheduler(), diffusers.FlowMatchHeunDiscreteScheduler()):
            for run in (fast, loop):
                loop.scheduler = copy.deepcopy(scheduler)
                ran = 6 if isinstance(scheduler, diffusers.DDIMScheduler) else 11
                where = [(branch, step) for step in range(ran) for branch in range(2)]
                plain = Loop(loop.scheduler, transformer=plain_model)
                expected = loop_by_hand(plain, where, 6, *call, masks=loop_masks(ran))
                assert torch.equal(run(6, *call), expected)


def test_a_fixed_schedule_is_for_its_own_timesteps(loop):
    call = loop_call()
    loop.scheduler.set_timesteps(6)
    timesteps = loop.scheduler.timesteps
    fixed = loop_schedule([round(t, 2) for t in timesteps.tolist()])
    expected = loop_by_hand(loop, ALL_STEPS, 6, *call)
    with compile_eager(loop, fixed) as fast:
        assert torch.equal(fast(6, *call), expected)
        with pytest.raises(
            pabc.GuardError, match=r"expected the schedule's timesteps, 6 .*found .*5"
        ):
            fast(5, *call)
        assert torch.equal(fast(6, *call), expected)


def test_a_loop_that_does_not_use_its_scheduler_is_told_of(loop):
    call = loop_call()
    with compile_eager(loop) as fast:
        aside = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        aside.set_timesteps(6)
        with pytest.warns(UserWarning, match=r"called 12 times and .* made no step.*at_step"):
            fast(6, *call, scheduler=aside)
        loop.scheduler.set_timesteps(6)
        copied = copy.deepcopy(loop.scheduler)
        with pytest.raises(pabc.GuardError, match=r"found a step of a copy of it in one step"):
            fast(6, *call, scheduler=copied)
        assert fast.models["transformer"].stats.nbytes == 0


def test_a_call_after_the_last_step_is_refused(loop):
    x, *texts = loop_call()
    with compile_eager(loop):
        loop(4, x, *texts)
        with pytest.raises(pabc.GuardError, match=r"expected 4 steps.* found a call after step 3"):
            loop.transformer(x, torch.zeros(1), texts[0])
