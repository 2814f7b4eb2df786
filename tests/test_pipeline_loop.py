"""A hand-made loop as the pipeline: guidance, experts, exceptions, components, threads."""

import threading

import diffusers
import pytest
import torch
from loops import (
    ALL_STEPS,
    Loop,
    compile_eager,
    loop_by_hand,
    loop_call,
    loop_schedule,
    make_denoiser,
    make_loop,
)

import pabc

pytestmark = pytest.mark.runtime


@pytest.fixture
def loop():
    return make_loop()


def test_calls_of_one_step_are_kept_apart_by_order(loop):
    call = loop_call()
    plain = loop(6, *call)
    expected = loop_by_hand(loop, ALL_STEPS, 6, *call)
    with compile_eager(loop) as fast:
        assert torch.equal(fast(6, *call), expected)
        assert torch.equal(loop(6, *call), expected), "the pipeline itself is compiled"
        assert fast.models["transformer"].stats.nbytes == 0
    assert not torch.equal(plain, expected)
    assert torch.equal(loop(6, *call), plain)


def test_a_step_without_guidance_does_no_harm(loop):
    call, skipped = loop_call(), (2, 3)
    where = [(b, step) for b, step in ALL_STEPS if b == 0 or step not in skipped]
    guided = lambda step: step not in skipped  # noqa: E731
    expected = loop_by_hand(loop, where, 6, *call, guided=guided)
    with compile_eager(loop) as fast:
        assert torch.equal(fast(6, *call, guided=guided), expected)
        ended = fast(6, *call, guided=lambda step: step < 2)
        assert fast.models["transformer"].stats.nbytes == 0, "of the branch that ended early too"
    where = [(b, step) for b, step in ALL_STEPS if b == 0 or step < 2]
    assert torch.equal(ended, loop_by_hand(loop, where, 6, *call, guided=lambda step: step < 2))


def test_a_new_call_that_comes_first_in_the_second_step_is_not_taken_for_the_old_one(loop):
    call = loop_call()
    guided = {1, 2, 3}.__contains__
    with compile_eager(loop) as fast:
        with pytest.raises(pabc.GuardError, match="name the calls"):
            fast(6, *call, guided=guided, alone=1)
        assert fast.models["transformer"].stats.nbytes == 0
        again = fast(6, *call)
    assert torch.equal(again, loop_by_hand(loop, ALL_STEPS, 6, *call))


@pytest.mark.parametrize("guided_at", [{0}, {0, 1, 2}, {0, 1, 4, 5}, {2, 3, 4}, {0, 1, 2, 3, 4, 5}])
@pytest.mark.parametrize("alone", [0, 1])
def test_calls_are_told_apart_by_their_text_where_guidance_pauses(loop, alone, guided_at):
    """By order alone, a call without guidance would read what the first text's calls have kept."""
    call = loop_call()
    where = [(b, step) for b, step in ALL_STEPS if step in guided_at or b == alone]
    how = {"guided": guided_at.__contains__, "alone": alone}
    expected = loop_by_hand(loop, where, 6, *call, **how)
    with compile_eager(loop) as fast:
        assert torch.equal(fast(6, *call, **how), expected)


def test_texts_that_are_built_anew_at_each_step_are_told_apart_by_order(loop):
    call = loop_call()
    expected = loop_by_hand(loop, ALL_STEPS, 6, *call)
    with compile_eager(loop) as fast:
        assert torch.equal(fast(6, *call, text_of=lambda text, _: text.clone()), expected)
        assert not fast.models["transformer"].stats.fallbacks


def test_nothing_kept_for_one_text_is_read_for_another(loop):
    call = loop_call(num_texts=1)
    other = call[1] * 2
    text_of = lambda text, step: text if step < 3 else other  # noqa: E731
    where = [(int(step >= 3), step) for step in range(6)]
    expected = loop_by_hand(loop, where, 6, *call, text_of=text_of)
    with compile_eager(loop) as fast:
        assert torch.equal(fast(6, *call, text_of=text_of), expected)
        assert fast.models["transformer"].stats.fallbacks == {"missing": 1}


def test_each_expert_begins_at_its_own_first_step(loop):
    loop.transformer_2, call = make_denoiser(1), loop_call()
    model_of = lambda step: "transformer" if step < 3 else "transformer_2"  # noqa: E731
    expected = loop_by_hand(loop, ALL_STEPS, 6, *call, model_of=model_of)
    held = []
    with compile_eager(loop) as fast:
        first, second = fast.models.values()
        watch = lambda step: held.append((first.stats.nbytes, second.stats.nbytes))  # noqa: E731
        assert torch.equal(fast(6, *call, model_of=model_of, callback=watch), expected)
        assert not first.stats.fallbacks and not second.stats.fallbacks
    assert [a > 0 for a, _ in held] == [True, True, True, False, False, False]
    assert [b > 0 for _, b in held] == [False, False, False, True, True, False]


@pytest.mark.parametrize(("reused", "steps"), [((4, 5), "0 to 2"), ((1, 2), "3 to 5")])
def test_an_expert_that_can_reuse_nothing_is_warned_of_once(loop, reused, steps):
    loop.transformer_2, call = make_denoiser(1), loop_call()
    mask = [step in reused for step in range(6)]
    schedule = lambda ts: pabc.Schedule.from_masks(ts, {"full": mask})  # noqa: E731
    model_of = lambda step: "transformer" if step < 3 else "transformer_2"  # noqa: E731
    message = f"ran the steps from {steps} of 6 could"
    with compile_eager(loop, schedule) as fast:
        run_twice = lambda: [fast(6, *call, model_of=model_of) for _ in range(2)]  # noqa: E731
        with pytest.warns(UserWarning, match=message) as warned:
            run_twice()
    assert len(warned) == 1


@pytest.mark.parametrize("through", ["fast", "pipe"])
def test_an_exception_in_the_middle_leaks_nothing(loop, through):
    call = loop_call()
    expected = loop_by_hand(loop, ALL_STEPS, 6, *call)

    def fail(step):
        if step == 2:
            raise KeyboardInterrupt

    with compile_eager(loop) as fast:
        model = fast.models["transformer"]
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                (fast if through == "fast" else loop)(6, *call, callback=fail)
            assert (model.stats.nbytes == 0) == (through == "fast")
            assert torch.equal(fast(6, *call), expected)
        if through == "pipe":
            assert torch.equal(loop(6, *call), expected), "begins anew"
        fast.reset()
        assert model.stats.nbytes == 0


def test_an_exception_inside_of_the_model_leaks_nothing(loop):
    call = loop_call()
    expected = loop_by_hand(loop, ALL_STEPS, 6, *call)
    with compile_eager(loop) as fast:
        with pytest.raises(TypeError):
            fast(6, call[0], *call[1:], guided=lambda step: step < 2 or 1 / "step")
        assert fast.models["transformer"].stats.nbytes == 0
        assert torch.equal(fast(6, *call), expected)


def test_a_preset_by_name(loop):
    call = loop_call()
    with compile_eager(loop, "opensora_plan12") as fast:
        named = fast(30, *call)
        plan = fast.models["transformer"].plan
    assert plan.reuse_fraction("full") > 0.2 and plan.reuse_fraction("mlp") == 0
    with compile_eager(loop, pabc.presets.opensora_plan12) as fast:
        assert torch.equal(fast(30, *call), named)


def test_what_is_no_schedule_or_component_is_refused(loop):
    with pytest.raises(ValueError, match=r"preset: expected one of .*, found 'nonsense'"):
        pabc.compile_pipeline(loop, "nonsense")
    with pytest.raises(TypeError, match=r"expected a pabc.Schedule, a preset .* found int"):
        pabc.compile_pipeline(loop, 3)
    with compile_eager(loop, lambda ts: 3) as fast, pytest.raises(TypeError, match="found int"):
        fast(3, *loop_call())
    with pytest.raises(ValueError, match=r"expected names of modules, transformer.*, found 'unet'"):
        pabc.compile_pipeline(loop, loop_schedule, components=["unet"])
    with pytest.raises(ValueError, match="a module named as a transformer, found denoiser"):
        pabc.compile_pipeline(Loop(loop.scheduler, denoiser=make_denoiser()), loop_schedule)
    with pytest.raises(ValueError, match="backend"):
        pabc.compile_pipeline(loop, loop_schedule, backend="nonsense")
    with pytest.raises(TypeError, match=r"pipe.scheduler: .* found NoneType without set_timesteps"):
        pabc.compile_pipeline(Loop(None, transformer=loop.transformer), loop_schedule)
    assert "step" not in vars(loop.scheduler) and type(loop.transformer).__name__ == "Image"


def test_a_model_that_is_compiled_already_is_used_as_it_is(loop):
    call, original = loop_call(), loop.transformer
    expected = loop_by_hand(loop, ALL_STEPS, 6, *call)
    compiled = pabc.compile(original, pabc.Schedule.none((0,)), backend="eager")
    when = torch.tensor(0.0).expand(1)
    compiled(call[0], when, call[1])
    loop.transformer = compiled
    with pabc.compile_pipeline(loop, loop_schedule) as fast:
        assert fast.models["transformer"] is compiled
        assert torch.equal(fast(6, *call), expected)
        assert compiled.stats.captures == 1
        with compile_eager(loop) as other:  # it is in use: compiled for a second time
            assert other.models["transformer"] is not compiled
            assert torch.equal(other(6, *call), expected)
    assert loop.transformer is compiled
    compiled(call[0], when, call[1])  # by itself, as before


def test_memory_options_reach_the_model(loop):
    call = loop_call()
    with compile_eager(loop, memory_budget=2**20) as fast:
        fast(6, *call)
        held = fast.models["transformer"].stats.peak_nbytes
    with compile_eager(loop, memory_budget=held // 4) as fast:
        fast(6, *call)
        assert 0 < fast.models["transformer"].stats.peak_nbytes <= held // 2  # of two branches


def test_a_component_by_name():
    loop, call = Loop(diffusers.DDIMScheduler(), denoiser=make_denoiser()), loop_call()
    model_of = lambda step: "denoiser"  # noqa: E731
    plain = loop(4, *call, model_of=model_of)
    with compile_eager(loop, components=["denoiser"]) as fast:
        assert not torch.equal(fast(4, *call, model_of=model_of), plain)


def test_pipelines_that_share_a_transformer_run_in_threads():
    model, call, found, errors = make_denoiser(), loop_call(), {}, []
    loops = [
        Loop(diffusers.FlowMatchEulerDiscreteScheduler(shift=n), transformer=model) for n in (2, 5)
    ]
    expected = [
        loop_by_hand(loop, [(b, s) for s in range(n) for b in range(2)], n, *call)
        for loop, n in zip(loops, (6, 8), strict=True)
    ]
    fasts = [compile_eager(loop) for loop in loops]

    def work(index, num_steps):
        try:
            found[index] = [fasts[index](num_steps, *call) for _ in range(3)]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in ((0, 6), (1, 8))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for i, fast in enumerate(fasts):
        assert all(torch.equal(each, expected[i]) for each in found[i])
        fast.undo()


def test_calls_of_one_pipeline_in_threads_are_kept_apart():
    """With a scheduler that holds nothing of one loop, as DDIM's, diffusers allows it too."""
    loop, found, errors = Loop(diffusers.DDIMScheduler(), transformer=make_denoiser()), {}, []
    calls = [tuple(x * (1 + seed) for x in loop_call()) for seed in range(4)]
    expected = [loop_by_hand(loop, ALL_STEPS, 6, *call) for call in calls]

    def work(seed):
        try:
            found[seed] = [fast(6, *calls[seed]) for _ in range(3)]
        except Exception as error:
            errors.append(error)

    with compile_eager(loop) as fast:
        fast(6, *calls[0])
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert all(torch.equal(x, expected[seed]) for seed in range(4) for x in found[seed])
        assert fast.models["transformer"].stats.nbytes == 0


def test_inductor(loop):
    call = loop_call()
    masks = {"full": [False, True, True], "mlp": [False, True, True]}
    expected = loop_by_hand(loop, ALL_STEPS[:6], 3, *call, masks=masks)
    schedule = lambda ts: pabc.Schedule.from_masks(ts, masks)  # noqa: E731
    with pabc.compile_pipeline(loop, schedule) as fast:
        for _ in range(2):
            assert (fast(3, *call) - expected).abs().max() < 1e-5
