"""Hooks of diffusers and accelerate on a model's modules: casts are captured, others refused."""

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading, apply_layer_skip, apply_layerwise_casting
from pipelines import build, make_wan, noise, text

import pabc

STEPS = (900, 600, 300)
CPU = torch.device("cpu")


def run(model):
    latents, states = noise(1, 4, 3, 6, 8), text(1, 0)
    with torch.no_grad():
        return torch.stack(
            [
                model(latents * t / 900, torch.tensor([t]), states, return_dict=False)[0]
                for t in STEPS
            ]
        )


def make():
    return build("Wan", num_layers=1)


def compile_plainly(model, **options):
    return pabc.compile(model, pabc.Schedule.none(STEPS), backend="eager", **options)


def offload_blocks(model):
    apply_group_offloading(model, CPU, CPU, "block_level", num_blocks_per_group=1)


def offload_leaves(model):
    apply_group_offloading(model, CPU, CPU, "leaf_level")


def offload_all(model):
    cpu_offload(model, execution_device="cpu")


def cache_attention(model):
    model.enable_cache(
        diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 1
        )
    )


def cache_blocks(model):
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))


REFUSED = [
    (offload_blocks, r"GroupOffloadingHook \(diffusers.hooks.group_offloading\).*offload"),
    (offload_leaves, r"GroupOffloadingHook.*enable_model_cpu_offload"),
    (offload_all, r"AlignDevicesHook \(accelerate.hooks\).*enable_model_cpu_offload"),
    (cache_attention, r"PyramidAttentionBroadcastHook.*disable_cache"),
    (cache_blocks, r"blocks.0: expected no hook that keeps values.*FBC\w+.*disable_cache"),
]
IDS = [put_on.__name__ for put_on, _ in REFUSED]


@pytest.mark.parametrize(("put_on", "message"), REFUSED, ids=IDS)
def test_hooks_that_a_graph_cannot_stand_for_are_refused(put_on, message):
    pipe = make_wan()
    if put_on is cache_blocks:
        pipe.transformer = build("Wan", num_layers=2)
    put_on(pipe.transformer)
    for refuse in (
        lambda: compile_plainly(pipe.transformer),
        lambda: compile_plainly(pipe.transformer, inplace=True),
        lambda: pabc.compile_pipeline(pipe, pabc.Schedule.none),
        lambda: pabc.explain(pipe.transformer, noise(1, 4, 3, 6, 8), torch.tensor([9]), text(1, 0)),
    ):
        with pytest.raises(ValueError, match=message):
            refuse()
    assert "_compiled_call_impl" not in vars(pipe.transformer)


@pytest.mark.parametrize(("put_on", "message"), REFUSED[:4], ids=IDS[:4])
def test_hooks_that_are_put_on_later_are_refused_at_the_next_generation(put_on, message):
    model = make()
    fast = compile_plainly(model)
    run(fast)
    put_on(model)
    with pytest.raises(ValueError, match=message):
        run(fast)


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16])
@pytest.mark.parametrize("whole", [False, True], ids=["layers", "whole"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_layerwise_casting_is_captured(storage, whole, when):
    def cast(model):
        if whole:
            apply_layerwise_casting(model, storage, torch.float32, None, None)
        else:
            model.enable_layerwise_casting(storage, torch.float32)

    model, plain = make(), make()
    cast(plain)
    expected = run(plain)
    if when == "before":
        cast(model)
    fast = compile_plainly(model)
    run(fast)
    if when == "after":
        cast(model)
    kinds = {name: p.dtype for name, p in plain.named_parameters()}
    for _ in range(2):
        assert torch.equal(run(fast), expected)
        assert {name: p.dtype for name, p in model.named_parameters()} == kinds
    fast.schedule = pabc.Schedule.from_masks(
        STEPS, dict.fromkeys(("full", "cross"), (False, True, True))
    )
    assert not torch.equal(run(fast), expected) and fast.stats.reused == 4
    assert fast.stats.captures == 1 + (when == "after") and not fast.explain().outside


def test_skipped_layers_are_captured():
    model, plain = build("Wan", num_layers=2), build("Wan", num_layers=2)
    fast = compile_plainly(model)
    before = run(fast)
    for each in (model, plain):
        apply_layer_skip(each, diffusers.LayerSkipConfig(indices=[1], fqn="blocks"))
    assert torch.equal(run(fast), run(plain)) and not torch.equal(run(plain), before)


def test_a_hook_that_another_forward_was_put_around_is_refused():
    pipe = make_wan()
    pipe.enable_model_cpu_offload(device="cpu")
    forward = pipe.transformer.forward
    pipe.transformer.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with pytest.raises(
        ValueError, match=r"offloads weights while the model runs, found CpuOffload"
    ):
        compile_plainly(pipe.transformer)
