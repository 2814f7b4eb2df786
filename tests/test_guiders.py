"""Guiders of diffusers: each of their calls is a branch, those with layers skipped as well."""

import diffusers
import pytest
import torch
from diffusers import guiders
from modular import (
    GUIDERS,
    make_modular,
    make_modular_experts,
    modular_masks,
    run_modular,
    run_modular_by_hand,
)
from pipelines import ByHand, Masks
from zoo.image import PIXART

import pabc

pytestmark = pytest.mark.runtime


def reuse(timesteps):
    return pabc.Schedule.from_masks(timesteps, modular_masks(len(timesteps)))


def stats_of(fast):
    return fast.models["transformer"].stats


@pytest.mark.parametrize("name", GUIDERS)
def test_each_call_of_a_guider_is_a_branch(name):
    make = GUIDERS[name]
    skips = name.startswith(("skip", "auto"))
    plain = run_modular(make_modular(make()))
    pipe, schedule = make_modular(make()), pabc.Schedule.none
    with pabc.compile_pipeline(pipe, lambda ts: schedule(ts), backend="eager") as fast:
        assert torch.equal(run_modular(fast), plain), "nothing reused"
        schedule = reuse
        found = run_modular(fast)
        assert torch.equal(run_modular(fast), found)
        stats = stats_of(fast)
        assert stats.captures == 1 + skips and stats.reused > 0 and stats.nbytes == 0
        assert set(stats.fallbacks) <= {"missing"}, "a branch that begins late"
    assert torch.equal(found, run_modular_by_hand(make())) and not torch.equal(found, plain)
    assert torch.equal(run_modular(pipe), plain), "undone"


@pytest.mark.parametrize("name", ["skip-layer", "auto-guidance"])
def test_layers_that_are_skipped_change_the_results(name):
    """So that the test above would see a call with them taken for one without."""
    whole = run_modular(make_modular(GUIDERS["classifier-free"]()))
    assert not torch.equal(run_modular(make_modular(GUIDERS[name]())), whole)


@pytest.mark.parametrize("name", ["classifier-free", "skip-layer", "auto-guidance"])
def test_whole_calls_are_skipped_from_the_first_generation_on_as_later(name):
    """What removed hooks leave on the layers does not make another model of it."""
    pipe = make_modular(GUIDERS[name]())

    def skip(timesteps):
        return pabc.Schedule.skip(timesteps, (0, 1, 3, 5))

    with pabc.compile_pipeline(pipe, skip, backend="original") as fast:
        first = run_modular(fast)
        reused = stats_of(fast).reused
        assert torch.equal(run_modular(fast), first)
        assert stats_of(fast).reused == 2 * reused and not stats_of(fast).fallbacks


@pytest.mark.parametrize("name", ["classifier-free, for a part of the steps", "skip-layer"])
def test_auto_plans_the_calls_of_a_guider(name):
    make = GUIDERS[name]
    plain = run_modular(make_modular(make()), 12)
    request = pabc.auto(calls=8, floor=1.0, cache=False, candidates=1)
    with pabc.compile_pipeline(make_modular(make()), request, backend="original") as fast:
        assert torch.equal(run_modular(fast, 12), plain)
        found = run_modular(fast, 12)
        assert stats_of(fast).recorded == 1 and stats_of(fast).reused >= 4
        assert not torch.equal(found, plain)


def test_two_experts_with_a_guider_each():
    plain = run_modular(make_modular_experts())
    schedule = pabc.Schedule.none
    with pabc.compile_pipeline(
        make_modular_experts(), lambda ts: schedule(ts), backend="eager"
    ) as fast:
        assert torch.equal(run_modular(fast), plain)
        schedule = reuse
        found = run_modular(fast)
        assert torch.equal(run_modular(fast), found) and not torch.equal(found, plain)
        for model in fast.models.values():
            stats = model.stats
            assert stats.captures == 2 and stats.reused > 0 and set(stats.fallbacks) <= {"missing"}


STEPS = (900.0, 700.0, 500.0, 300.0)
PAG_MASKS: Masks = {"cross": (False, True, True, False)}
"""Nothing else: where the softmax is left out, the attention of a layer counts as an MLP."""
CALLS = ("cond", "uncond", "perturbed")


class GuidedLoop:
    """A loop of one's own around a model, which perturbed-attention guidance drives."""

    def __init__(self):
        self.model, self.call = PIXART.build()
        self.guider = guiders.PerturbedAttentionGuidance(
            perturbed_guidance_layers=[0], perturbed_guidance_start=0.2, perturbed_guidance_stop=1.0
        )

    @torch.no_grad()
    def run(self, model, name_call=None):
        found = []
        for step, t in enumerate(STEPS):
            self.guider.set_state(step, len(STEPS), t)
            for scale, name in enumerate(CALLS[: self.guider.num_conditions]):
                call = dict(self.call)
                call["hidden_states"] = call["hidden_states"] * (1 + step / 4)
                call["encoder_hidden_states"] = call["encoder_hidden_states"] * (1 + scale % 2)
                call["timestep"] = torch.full_like(call["timestep"], t)
                self.guider.prepare_models(self.model)
                if name_call is None:
                    found.append(model(**call)[0])
                else:
                    with name_call(name):
                        found.append(model(**call)[0])
                self.guider.cleanup_models(self.model)
        return found


@pytest.mark.parametrize("inplace", [False, True])
def test_perturbed_attention_in_a_loop_of_ones_own(inplace):
    loop = GuidedLoop()
    plain = loop.run(loop.model)
    assert len(plain) == 11 and not torch.equal(plain[2], plain[4]), "perturbed from step 1 on"
    schedule = pabc.Schedule.from_masks(STEPS, PAG_MASKS)
    fast = pabc.compile(loop.model, schedule, backend="eager", inplace=inplace)
    model = loop.model if inplace else fast
    found = loop.run(model, fast.cache_context)
    assert fast.stats.reused > 0
    fast.schedule = pabc.Schedule.none(STEPS)
    for a, b in zip(loop.run(model, fast.cache_context), plain, strict=True):
        assert torch.equal(a, b)
    assert fast.stats.captures == 2
    fast.undo()
    where = iter(
        [(name, step) for step in range(4) for name in (CALLS[:2] if step == 0 else CALLS)]
    )
    kinds = {"*.attn2": "cross"}
    for a, b in zip(found, loop.run(ByHand(loop.model, kinds, PAG_MASKS, where)), strict=True):
        assert torch.equal(a, b)


def test_a_hook_that_caches_is_refused_in_a_modular_pipeline():
    pipe = make_modular(GUIDERS["classifier-free"]())
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"expected no hook that keeps values.*disable_cache"):
        pabc.compile_pipeline(pipe, reuse)
