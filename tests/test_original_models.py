"""`backend="original"` with models as users set them up: offloaded, cast, quantized, adapted."""

from __future__ import annotations

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from pipelines import build, noise, text
from skipping import MASK, TIMESTEPS, ForecastByHand, SkipByHand, assert_alike, copy, skip_calls
from torch import nn
from torch._dynamo.testing import EagerAndRecordGraphs

import pabc

pytestmark = pytest.mark.runtime
CPU = torch.device("cpu")
COMPUTED = tuple(step for step, skipped in enumerate(MASK) if not skipped)
LINEAR = pabc.Schedule.skip(TIMESTEPS, COMPUTED)


def make(num_layers=2):
    return build("Wan", num_layers=num_layers)


@torch.no_grad()
def run(model, steps=range(7)):
    latents, states = noise(1, 4, 3, 6, 8), text(1, 0)
    return [
        copy(model(latents * t / 900, torch.tensor([t]), states, return_dict=False)[0])
        for t in (TIMESTEPS[step] for step in steps)
    ]


def forecast(model, computed=COMPUTED):
    def call(*args, **kwargs):
        return model(*args, **kwargs)[0]

    by_hand = ForecastByHand(call, computed, 2)
    return run(lambda *args, **kwargs: (by_hand(*args, **kwargs),))


def group(model, **options):
    apply_group_offloading(model, CPU, CPU, **options)


SETUPS = {
    "group, blocks": lambda m: group(m, offload_type="block_level", num_blocks_per_group=1),
    "group, leaves": lambda m: group(m, offload_type="leaf_level"),
    "sequential": lambda m: cpu_offload(m, execution_device="cpu"),
    "casting": lambda m: m.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
    "hooks": lambda m: m.register_forward_pre_hook(lambda _, args: (args[0] / 2, *args[1:])),
    "compiled in place": lambda m: m.compile(backend="eager"),
    "compiled blocks": lambda m: m.compile_repeated_blocks(backend="aot_eager", fullgraph=True),
}


@pytest.mark.parametrize("set_up", SETUPS.values(), ids=SETUPS)
def test_a_model_runs_as_it_was_set_up(set_up):
    model, plain = make(), make()
    for each in (model, plain):
        set_up(each)
    fast = skip_calls(model, LINEAR)
    run(fast)  # which may build what the model keeps
    for _ in range(2):
        assert_alike(run(fast), forecast(plain))
    assert fast.stats.computed <= 3 * 4 + 1 and sum(fast.stats.fallbacks.values()) <= 1


@pytest.mark.parametrize("in_use", [False, True], ids=["before", "after"])
def test_offloading_that_is_set_up_later(in_use):
    model, plain = make(), make()
    fast = skip_calls(model, LINEAR)
    if in_use:
        run(fast)
    cpu_offload(model, execution_device="cpu")
    run(fast)
    assert_alike(run(fast), forecast(plain))


def test_an_inner_cache_is_refused_by_name():
    model = make()
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    fast = skip_calls(model, LINEAR)
    with (
        model.cache_context("cond"),
        pytest.raises(ValueError, match=r"found that each one changes blocks\.0.*turn off what"),
    ):
        run(fast)


def test_quantized_weights():
    gguf = pytest.importorskip("gguf")
    utils = pytest.importorskip("diffusers.quantizers.gguf.utils")
    kind = gguf.GGMLQuantizationType.Q8_0

    class Quantized(nn.Module):
        def __init__(self):
            super().__init__()
            plain = torch.arange(32 * 32, dtype=torch.float32).view(32, 32).sin()
            self.layer = utils.GGUFLinear(32, 32, False, compute_dtype=torch.float32)
            data = gguf.quants.quantize(plain.numpy(), kind)
            self.layer.weight = utils.GGUFParameter(torch.from_numpy(data), quant_type=kind)

        def forward(self, x, t, states, return_dict):
            return (self.layer(x.flatten()[:32]) * t,)

    model = Quantized().eval()
    fast = skip_calls(model, LINEAR)
    assert_alike(run(fast), forecast(model))
    assert not fast.stats.fallbacks


def test_adapters_that_are_switched_between_and_within_generations():
    peft = pytest.importorskip("peft")
    models = [make(), make()]
    for each in models:
        for seed, name in enumerate(("a", "b")):
            torch.manual_seed(seed)
            config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
            each.add_adapter(config, adapter_name=name)
    fast = skip_calls(models[0])
    found = []
    for name, scale in (("a", 1.0), ("b", 1.0), ("b", 0.5), ("a", 1.0)):
        for each in models:
            each.set_adapters([name], [scale])
        found.append(run(fast))
        assert_alike(found[-1], run(SkipByHand(models[1])))
        assert not fast.stats.fallbacks
    assert not torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[1][0], found[2][0])
    steps = [run(fast, range(5))]
    for each in models:
        each.disable_adapters()
    steps.append(run(fast, range(5, 7)))
    assert dict(fast.stats.fallbacks) == {"model": 1}
    assert torch.equal(steps[1][0], run(models[1], [5])[0])


def test_a_unet_with_outputs_in_a_record():
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
    ).eval()
    fast = skip_calls(unet)
    latents, states = noise(2, 4, 8, 8), text(2, 0)

    def sample(model):
        with torch.no_grad():
            return [copy_record(model(latents * t / 900, t, states)) for t in TIMESTEPS]

    def copy_record(found):
        return type(found)(sample=found.sample.clone())

    for _ in range(2):
        assert_alike(sample(fast), sample(SkipByHand(unet)))
    assert fast.stats.reused == 6 and not fast.stats.fallbacks


def test_a_module_around_the_model_that_dynamo_compiled():
    backend = EagerAndRecordGraphs()
    plain = make(1)
    fast = skip_calls(torch.compile(plain, backend=backend), LINEAR, inplace=True)
    assert_alike(run(fast._orig_mod), forecast(plain))
    assert backend.graphs and fast.stats.reused == 3


class Attending(nn.Module):
    """An autoregressive model: keys and values of earlier calls are its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(4, 12)
        self.cache = {"keys": [], "values": []}

    def forward(self, x, t, states, return_dict):
        q, k, v = self.qkv(x.flatten(0, -5)[..., :4]).chunk(3, -1)
        self.cache["keys"].append(k)
        self.cache["values"].append(v)
        keys, values = (torch.cat(self.cache[name], -2) for name in ("keys", "values"))
        return (nn.functional.scaled_dot_product_attention(q, keys, values),)


def test_keys_and_values_of_earlier_calls_are_refused_by_name():
    fast = skip_calls(Attending().eval(), LINEAR)
    with pytest.raises(
        ValueError, match=r"Attending: .* changes cache\['keys'\]\[1\], from nothing"
    ):
        run(fast)
