"""Compiled pipelines of diffusers: against the plain one, and against a cache written by hand."""

import copy

import diffusers
import pytest
import torch
from accelerate import hooks
from loops import compile_eager, loop_schedule
from pipelines import PIPELINES, ByHand, make_wan

import pabc

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
            assert pipe.transformer is before["pipe"]["transformer"]
            assert snapshot(pipe) != before
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
        assert pipe.transformer is outer.models["transformer"]._orig_mod
        inner.undo()
        assert snapshot(pipe) != before
        outer.undo()
    else:
        with compile_eager(pipe) as fast:
            scheduler, fast.scheduler = fast.scheduler, other
            fast._observe()
            assert "step" not in vars(scheduler) and "step" in vars(other)
            pipe.scheduler = scheduler
    assert snapshot(pipe) == before and dict(pipe.config) == config and vars(other) == others


def test_attributes_are_those_of_the_pipeline(tmp_path):
    pipe = make_wan()
    with compile_eager(pipe) as fast:
        assert fast.scheduler is pipe.scheduler and fast.config is pipe.config
        fast.anything = 3
        assert pipe.anything == 3
        assert fast.to(torch.float64) is fast and pipe.transformer.dtype == torch.float64
        assert fast.models["transformer"].dtype == torch.float64
        assert pipe.components["transformer"] is fast.models["transformer"]._orig_mod
        fast.save_pretrained(tmp_path)
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
    with pytest.raises(ValueError, match=r"PyramidAttentionBroadcastHook .*disable_cache"):
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
        if when == "after":
            pipe.enable_model_cpu_offload(device="cpu")
        for _ in range(2):  # after each call the pipeline takes its hooks off and puts them on
            assert torch.equal(wan.run(fast), plain)
            assert pipe.transformer is original and "_hf_hook" in vars(original)
        assert moved == [original] * 24
        assert fast.models["transformer"].stats.captures == 1
    assert "_hf_hook" in vars(original)
    assert torch.equal(wan.run(pipe), plain)


def test_weights_that_move_within_a_call_are_refused():
    pipe = make_wan()
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match=r"AlignDevicesHook .*\(enable_model_cpu_offload\)"):
        compile_eager(pipe)
    pipe.remove_all_hooks()
    with compile_eager(make_wan()) as fast:
        fast.enable_sequential_cpu_offload(device="cpu")
        with pytest.raises(ValueError, match=r"AlignDevicesHook .*\(enable_model_cpu_offload\)"):
            fast(prompt="")
