"""Trajectories and branches: kept apart, and freed."""

import copy
import gc
import pickle
import threading
import weakref
from contextlib import nullcontext

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
from pabc.runtime.step import ActiveStep

pytestmark = pytest.mark.runtime


@pytest.fixture
def model():
    return Tiny().eval()


def test_trajectories_in_turns_give_what_each_gives_alone(model):
    fast = compile_eager(model)
    runs = [fast.trajectory() for _ in range(3)]
    found = [[], [], []]
    for seed, step in [(0, 0), (1, 0), (0, 1), (0, 2), (2, 0), (1, 1), (0, 3), (2, 1), (1, 2)] + [
        (2, 2), (1, 3), (1, 4), (2, 3), (0, 4), (2, 4)
    ]:  # fmt: skip
        with runs[seed]:
            found[seed].append(fast(*make_call(seed, step)))
    for seed in range(3):
        assert_equal(found[seed], run_alone(model, seed))
    assert fast.stats.captures == 1 and not fast.stats.fallbacks
    assert fast.stats.generations == 3 and fast.stats.nbytes == 0


def test_default_trajectory_goes_on_after_another_one(model):
    fast = compile_eager(model)
    first = generate(fast, 0, steps=range(2))
    with fast.trajectory():
        inner = generate(fast, 1)
        with fast.trajectory():
            innermost = generate(fast, 2)
    assert_equal(first + generate(fast, 0, steps=range(2, 5)), run_alone(model, 0))
    assert_equal(inner, run_alone(model, 1))
    assert_equal(innermost, run_alone(model, 2))


def test_two_calls_a_step_are_kept_apart_by_name(model):
    fast = compile_eager(model)
    found = {"cond": [], "uncond": []}
    for step in range(5):
        for seed, name in enumerate(found):
            with fast.cache_context(name):
                found[name].append(fast(*make_call(seed, step)))
    assert_equal(found["cond"], run_alone(model, 0))
    assert_equal(found["uncond"], run_alone(model, 1))


def test_branches_belong_to_their_trajectory(model):
    fast = compile_eager(model)
    runs, found = [fast.trajectory(), fast.trajectory()], [[], []]
    for step in range(5):
        for seed, run in enumerate(runs):
            with run, fast.cache_context("cond"):
                found[seed].append(fast(*make_call(seed, step)))
    for seed in range(2):
        assert_equal(found[seed], run_alone(model, seed))


def test_two_models_do_not_share_contexts(model):
    fast, other = compile_eager(model), compile_eager(model)
    with fast.trajectory() as run, fast.cache_context("cond"):
        generate(other, 0, steps=range(3))
        assert run.step == 0
    assert_equal(generate(other, 0, steps=range(3, 5)), run_alone(model, 0)[3:])


def test_calls_within_a_stated_step_are_told_apart_by_order(model):
    fast = compile_eager(model)
    found = [[], []]
    with fast.trajectory() as run:
        for step in range(5):
            run.at_step(step)
            for seed in range(2):
                found[seed].append(fast(*make_call(seed, step)))
    for seed in range(2):
        assert_equal(found[seed], run_alone(model, seed))
    assert fast.stats.nbytes == 0


def test_a_stated_step_may_be_skipped(model):
    """What a skipped step would have stored is computed by the next one, and kept from there on."""
    fast = compile_eager(model, pabc.Schedule.pyramid(TIMESTEPS, full=5))
    with fast.trajectory() as run:
        for step in (0, 1, 3, 4):
            run.at_step(step)
            fast(*make_call(0, step))
        assert not fast.stats.fallbacks, "valid until step 4"
        run.reset()
        for step in (1, 2):
            run.at_step(step)
            found = fast(*make_call(0, step))
        assert fast.stats.fallbacks == {"missing": 1}
    assert not torch.equal(found, model(*make_call(0, 2)))
    with pytest.raises(ValueError, match="at_step: expected a step of 0 or more, found -1"):
        run.at_step(-1)


def test_a_value_is_not_read_after_the_step_that_replaces_it(model):
    fast = compile_eager(model, pabc.Schedule.pyramid(TIMESTEPS, full=2))
    with fast.trajectory() as run:
        for step in (0, 3):  # step 2 would have stored what step 3 reads
            run.at_step(step)
            found = fast(*make_call(0, step))
    assert torch.equal(found, model(*make_call(0, 3)))
    assert fast.stats.fallbacks == {"missing": 1}


def test_threads_each_with_a_trajectory(model):
    fast = compile_eager(model)
    found, errors = {}, []

    def work(seed):
        try:
            with fast.trajectory():
                found[seed] = generate(fast, seed, tokens=6 + seed % 3)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for seed in range(6):
        assert_equal(found[seed], run_alone(model, seed, tokens=6 + seed % 3))
    assert fast.stats.captures == 3 and fast.stats.nbytes == 0


def test_one_step_of_a_trajectory_at_a_time(monkeypatch):
    inside, release = threading.Event(), threading.Event()

    class Waiting(Tiny):
        def forward(self, x, t):
            return super().forward(x, t)

    fast = compile_eager(Waiting().eval())
    fast(*make_call(0, 0))
    run = ActiveStep.run

    def wait(step):
        inside.set()
        assert release.wait(10)
        return run(step)

    monkeypatch.setattr(ActiveStep, "run", wait)
    thread = threading.Thread(target=lambda: fast(*make_call(0, 1)))
    thread.start()
    assert inside.wait(10)
    with pytest.raises(
        pabc.GuardError, match=r"one step of a trajectory at a time.*trajectory\(\)"
    ):
        fast(*make_call(0, 1))
    release.set()
    thread.join()
    monkeypatch.undo()
    expected = run_alone(fast._orig_mod, 0)
    assert torch.equal(fast(*make_call(0, 2)), expected[2]), "the step under way was not disturbed"


def test_slots_are_freed_after_their_last_read(model):
    fast = compile_eager(model)
    for step in range(5):
        fast(*make_call(0, step))
        live = [slot for slot in range(4) if (fast.plan.sources[step + 1 :, slot] >= 0).any()]
        kept = fast.plan.sources[step + 1 : step + 2].max(initial=-1) >= 0
        assert (fast.stats.nbytes > 0) == bool(kept and live)
    assert fast.stats.nbytes == 0
    assert fast.stats.peak_nbytes == fast.plan.peak_bytes


@pytest.mark.parametrize("how", ["reset", "exception", "dropped", "raised inside"])
def test_an_abandoned_generation_frees_its_slots(model, how, monkeypatch):
    fast = compile_eager(model)
    run = fast.trajectory()
    with run:
        generate(fast, 0, steps=range(1))
    assert run.nbytes == fast.stats.nbytes > 0
    held = weakref.ref(next(iter(run._branches[None, 0].slots._held.values()))[0].cuts[0])
    if how == "reset":
        run.reset()
    elif how == "exception":
        with pytest.raises(ZeroDivisionError), run:
            _ = 1 / 0
    elif how == "dropped":
        del run
    else:
        with pytest.raises(TypeError), run:
            fast(nonsense=1)
    gc.collect()
    assert fast.stats.nbytes == 0 and held() is None
    assert_equal(generate(fast, 1), run_alone(model, 1))


def test_an_exception_in_the_default_trajectory_resets_it(model, monkeypatch):
    fast = compile_eager(model)
    generate(fast, 0, steps=range(2))

    def fail(step):
        raise MemoryError("no room")

    monkeypatch.setattr(ActiveStep, "run", fail)
    with pytest.raises(MemoryError):
        fast(*make_call(0, 2))
    monkeypatch.undo()
    assert fast.stats.nbytes == 0
    assert_equal(generate(fast, 0), run_alone(model, 0))


def test_out_of_memory_while_storing_leaves_nothing(model, monkeypatch):
    fast = compile_eager(model)
    generate(fast, 0, steps=range(2))
    calls = []

    def fail(tensor):
        calls.append(tensor)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no room")
        return tensor

    monkeypatch.setattr("pabc.runtime.slots.without_spare_memory", fail)
    with pytest.raises(torch.OutOfMemoryError):
        fast(*make_call(0, 2))
    monkeypatch.undo()
    assert fast.stats.nbytes == 0 and len(calls) == 2
    assert_equal(generate(fast, 0), run_alone(model, 0))


def test_replaced_weights_are_counted(model):
    fast = compile_eager(model)
    generate(fast, 0)
    model.head.weight = torch.nn.Parameter(model.head.weight * 2)
    assert_equal(generate(fast, 0), run_alone(model, 0))
    assert fast.stats.captures == 1


def test_schedule_of_the_next_generation(model):
    fast = compile_eager(model)
    generate(fast, 0, steps=range(2))
    compiles = fast.stats.compiles
    fast.schedule = pabc.Schedule.pyramid(TIMESTEPS[:3], full=2, mlp=3)
    assert_equal(generate(fast, 0, steps=range(2, 5)), run_alone(model, 0)[2:])
    assert fast.plan.num_steps == 5 or fast.plan.num_steps == 3
    outputs = generate(fast, 1, steps=range(3))
    assert_equal(outputs, run_alone(model, 1)[:3])
    assert fast.stats.generations == 2
    assert fast.stats.captures == 1 and fast.stats.compiles <= compiles + 2
    with pytest.raises(TypeError, match=r"expected a pabc\.Schedule, found int"):
        fast.schedule = 3


def test_a_trajectory_with_a_schedule_of_its_own(model):
    fast = compile_eager(model, pabc.Schedule.none(TIMESTEPS))
    with fast.trajectory(SCHEDULE):
        found = generate(fast, 0)
    assert_equal(found, run_alone(model, 0))
    assert_equal(generate(fast, 0), [model(*make_call(0, step)) for step in range(5)])


@pytest.mark.parametrize("copy_it", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_compiled_model_cannot_be_copied(model, copy_it):
    with pytest.raises(TypeError, match="compile the copy"):
        copy_it(compile_eager(model))


def test_stats_count_regions(model):
    fast = compile_eager(model)
    generate(fast, 0)
    plan, stats = fast.plan, fast.stats
    assert stats.reused == plan.reuse.sum()
    assert stats.computed == (~plan.reuse).sum()
    assert stats.stored == (plan.actions == pabc.Action.STORE).sum()
    assert (stats.calls, stats.generations) == (5, 1)
    assert "peak_nbytes" in str(stats) and "fallbacks    none" in str(stats)


@pytest.mark.parametrize("enter", [True, False])
def test_a_generation_is_the_same_in_either_trajectory(model, enter):
    fast = compile_eager(model)
    with fast.trajectory() if enter else nullcontext():
        assert_equal(generate(fast, 0), run_alone(model, 0))
