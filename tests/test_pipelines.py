"""Compiled pipelines: against the plain one, and against a cache written by hand."""

import copy
import inspect
import threading

import diffusers
import pytest
import torch
from accelerate import hooks
from pipelines import (
    LOOP_KINDS,
    PIPELINES,
    ByHand,
    Loop,
    loop_call,
    loop_masks,
    loop_schedule,
    make_denoiser,
    make_wan,
)

import pabc
from pabc.pipelines.scheduler import index_of

pytestmark = pytest.mark.runtime


def run_by_hand(pipeline, pipe, steps, num_steps, **arguments):
    """The plain pipeline, its transformers cached by hand."""
    names = [name for name in pipe.components if name.startswith("transformer")]
    originals = {name: vars(pipe)[name] for name in names if vars(pipe)[name] is not None}
    ran = steps(num_steps)
    where = pipeline.where(ran)
    for name, model in originals.items():
        vars(pipe)[name] = ByHand(model, pipeline.kinds, pipeline.masks(ran), where)
    try:
        return pipeline.run(pipe, num_steps, **arguments)
    finally:
        vars(pipe).update(originals)
        assert next(where, None) is None, "not as many calls as said"


@pytest.mark.parametrize("pipeline", PIPELINES, ids=str)
def test_pipeline_equals_the_cache_by_hand(pipeline, add_row):
    plain, pipe, schedule = pipeline.make(), pipeline.make(), pabc.Schedule.none
    with pabc.compile_pipeline(pipe, lambda ts: schedule(ts), backend="eager") as fast:
        for i, (name, (scheduler, steps)) in enumerate(pipeline.schedulers.items()):
            plain.scheduler, pipe.scheduler = copy.deepcopy(scheduler), copy.deepcopy(scheduler)
            schedule = pabc.Schedule.none
            assert torch.equal(pipeline.run(fast), pipeline.run(plain)), "nothing reused"
            schedule = lambda ts: pabc.Schedule.from_masks(ts, pipeline.masks(len(ts)))  # noqa: E731
            found = pipeline.run(fast)
            expected = run_by_hand(pipeline, plain, steps, 6)
            again = pipeline.run(fast, num_steps=9)
            assert torch.equal(again, run_by_hand(pipeline, plain, steps, 9))
            assert not torch.equal(found, pipeline.run(plain)), "nothing was reused"
            add_row(
                "diffusers pipelines, against a cache by hand (backend eager)",
                pipeline=pipeline.name,
                scheduler=name,
                steps=steps(6),
                calls=pipeline.calls * steps(6),
                max_error=f"{(found - expected).abs().max().item():g}",
            )
            assert torch.equal(found, expected)
            stats = [model.stats for model in fast.models.values()]
            assert all(s.nbytes == 0 and s.reused > 0 and not s.fallbacks for s in stats)
            assert all(s.captures <= 1 + i for s in stats), "timesteps of another dtype, at most"
        found = pipeline.run(fast, batch=2, size=1)
        assert torch.equal(found, run_by_hand(pipeline, plain, steps, 6, batch=2, size=1))


# ---- loops that ask what pipelines ask, around a smaller model ----

ALL_STEPS = [(branch, step) for step in range(6) for branch in range(2)]


@pytest.fixture
def loop():
    return Loop(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=make_denoiser())


def compile_eager(loop, schedule=loop_schedule, **options):
    return pabc.compile_pipeline(loop, schedule, backend="eager", **options)


def loop_by_hand(loop, where, num_steps, *call, masks=None, **more):
    """The plain loop with its models cached by hand."""
    names = [name for name in vars(loop) if name.startswith("transformer")]
    masks, where = masks or loop_masks(num_steps), iter(where)
    by_hand = {name: ByHand(vars(loop)[name], LOOP_KINDS, masks, where) for name in names}
    scheduler = copy.deepcopy(loop.scheduler)
    return Loop(scheduler, **by_hand)(num_steps, *call, **more)


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


def snapshot(pipe):
    parts = {name: part for name, part in vars(pipe).items() if hasattr(part, "__dict__")}
    return {
        "pipe": dict(vars(pipe)),
        **{name: copy.copy(vars(part)) for name, part in parts.items()},
        "hooks": [dict(m._forward_pre_hooks) for m in pipe.transformer.modules()],
    }


@pytest.mark.parametrize("how", ["with", "undo", "exception", "nested", "replaced"])
def test_undo_leaves_everything_as_it_was(how):
    pipe = make_wan()
    other = diffusers.FlowMatchHeunDiscreteScheduler()
    before, config, others = snapshot(pipe), dict(pipe.config), dict(vars(other))
    if how == "with":
        with compile_eager(pipe):
            assert pipe.transformer is not before["pipe"]["transformer"]
            assert dict(pipe.config) == config and pipe.transformer.config.num_layers == 1
    elif how == "undo":
        fast = compile_eager(pipe)
        fast.undo()
        fast.undo()
        with pytest.raises(RuntimeError, match="one that was undone"):
            fast()
    elif how == "exception":
        with pytest.raises(ValueError, match="`height` and `width`"), compile_eager(pipe) as fast:
            fast(height=1, width=1, prompt="")
    elif how == "nested":
        outer = compile_eager(pipe)
        inner = compile_eager(pipe)
        assert inner.models["transformer"]._orig_mod is before["pipe"]["transformer"]
        inner.undo()
        assert pipe.transformer is outer.models["transformer"]
        outer.undo()
    else:
        with compile_eager(pipe) as fast:
            scheduler, fast.scheduler = fast.scheduler, other
            fast._observe()
            assert "step" not in vars(scheduler) and "step" in vars(other)
            pipe.scheduler = scheduler
    assert snapshot(pipe) == before and dict(pipe.config) == config and vars(other) == others


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
    call = loop_call()
    with compile_eager(loop) as fast:
        fast(6, *call)
        for scheduler in (diffusers.DDIMScheduler(), diffusers.FlowMatchHeunDiscreteScheduler()):
            for run in (fast, loop):
                loop.scheduler = copy.deepcopy(scheduler)
                ran = 6 if isinstance(scheduler, diffusers.DDIMScheduler) else 11
                where = [(branch, step) for step in range(ran) for branch in range(2)]
                plain = Loop(loop.scheduler, transformer=fast.models["transformer"]._orig_mod)
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


def test_a_preset_by_name(loop):
    call = loop_call()
    with compile_eager(loop, "opensora_plan12") as fast:
        named = fast(30, *call)
        plan = fast.models["transformer"].plan
    assert plan.reuse_fraction("full") > 0.2 and plan.reuse_fraction("mlp") == 0
    with compile_eager(loop, pabc.presets.opensora_plan12) as fast:
        assert torch.equal(fast(30, *call), named)


def test_what_is_no_schedule_or_component_is_refused(loop):
    with pytest.raises(ValueError, match="preset: got 'nonsense', allowed: "):
        pabc.compile_pipeline(loop, "nonsense")
    with pytest.raises(TypeError, match=r"expected a pabc.Schedule, a preset .* found int"):
        pabc.compile_pipeline(loop, 3)
    with compile_eager(loop, lambda ts: 3) as fast, pytest.raises(TypeError, match="found int"):
        fast(3, *loop_call())
    with pytest.raises(ValueError, match="got 'unet', allowed: transformer"):
        pabc.compile_pipeline(loop, loop_schedule, components=["unet"])
    with pytest.raises(ValueError, match="found none among denoiser named as a transformer"):
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


@pytest.mark.slow
def test_inductor(loop):
    call = loop_call()
    masks = {"full": [False, True, True], "mlp": [False, True, True]}
    expected = loop_by_hand(loop, ALL_STEPS[:6], 3, *call, masks=masks)
    schedule = lambda ts: pabc.Schedule.from_masks(ts, masks)  # noqa: E731
    with pabc.compile_pipeline(loop, schedule) as fast:
        for _ in range(2):
            assert (fast(3, *call) - expected).abs().max() < 1e-5


def test_attributes_are_those_of_the_pipeline(tmp_path):
    pipe = make_wan()
    with compile_eager(pipe) as fast:
        assert fast.scheduler is pipe.scheduler and fast.config is pipe.config
        fast.anything = 3
        assert pipe.anything == 3
        assert fast.to(torch.float64) is fast and pipe.transformer.dtype == torch.float64
        assert fast.models["transformer"]._orig_mod.dtype == torch.float64
        assert pipe.components["transformer"] is fast.models["transformer"]
        fast.save_pretrained(tmp_path)
        assert pipe.transformer is fast.models["transformer"]
    del pipe.anything
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
    assert '"WanTransformer3DModel"' in (tmp_path / "model_index.json").read_text()


def test_diffusers_own_caching_is_refused():
    pipe = make_wan()
    pipe.transformer.enable_cache(
        diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 1
        )
    )
    with pytest.raises(ValueError, match=r"transformer: expected no hooks of diffusers.*disable"):
        pabc.compile_pipeline(pipe, loop_schedule)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_that_is_offloaded_between_calls(when, monkeypatch):
    pipe, moved = make_wan(), []
    original, wan = pipe.transformer, next(p for p in PIPELINES if p.name == "Wan")
    plain, move = wan.run(pipe), hooks.CpuOffload.pre_forward

    def watch(hook, module, *args, **kwargs):
        moved.append(module)
        return move(hook, module, *args, **kwargs)

    monkeypatch.setattr(hooks.CpuOffload, "pre_forward", watch)
    if when == "before":
        pipe.enable_model_cpu_offload(device="cpu")
    with compile_eager(pipe, pabc.Schedule.none) as fast:
        model = pipe.transformer
        if when == "after":
            pipe.enable_model_cpu_offload(device="cpu")
        for _ in range(2):  # after each call the pipeline takes its hooks off and puts them on
            assert torch.equal(wan.run(fast), plain)
            assert pipe.transformer is model and "_hf_hook" not in vars(original)
        assert moved == [model] * 24
    assert "_hf_hook" in vars(pipe.transformer) and pipe.transformer is original
    assert torch.equal(wan.run(pipe), plain)


def test_weights_that_move_within_a_call_are_refused():
    pipe = make_wan()
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match=r"hook of accelerate on .*; use enable_model_cpu_offload"):
        compile_eager(pipe)
    pipe.remove_all_hooks()
    with compile_eager(make_wan()) as fast:
        fast.enable_sequential_cpu_offload(device="cpu")
        with pytest.raises(
            ValueError, match=r"hook of accelerate on .*; use enable_model_cpu_offl"
        ):
            fast(prompt="")
