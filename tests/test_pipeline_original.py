"""Pipelines whose models cannot be captured: they are called as they are, if calls are skipped."""

from __future__ import annotations

import itertools
import logging

import diffusers
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from loops import Loop, compile_eager, loop_call, make_denoiser, make_loop
from pipelines import PIPELINES
from skipping import ForecastByHand
from torch import nn

import pabc

pytestmark = pytest.mark.runtime
CPU = torch.device("cpu")
COMPUTED = (0, 1, 3, 5)
WAN = next(pipeline for pipeline in PIPELINES if pipeline.name == "Wan")


def skip(timesteps):
    return pabc.Schedule.skip(timesteps, COMPUTED)


class Uncapturable(nn.Module):
    """A wrapper that leaves torch on its way."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.num_calls = itertools.count()

    def forward(self, x, t, text):
        next(self.num_calls)
        return torch.from_numpy(self.model(x, t, text).numpy() * 1)


class TwoCalls(nn.Module):
    """Two branches a step, by hand."""

    def __init__(self, model):
        super().__init__()
        self.calls = itertools.cycle([ForecastByHand(model, COMPUTED, 2) for _ in range(2)])

    def forward(self, *args):
        return next(self.calls)(*args)


def run_by_hand(model):
    loop = Loop(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=TwoCalls(model))
    return loop(6, *loop_call())


def test_a_model_that_cannot_be_captured_is_called_as_it_is(caplog):
    loop = make_loop()
    loop.transformer = Uncapturable(make_denoiser()).eval()
    expected = run_by_hand(make_denoiser())
    with caplog.at_level(logging.WARNING, "pabc"), compile_eager(loop, skip) as fast:
        model = fast.models["transformer"]
        for _ in range(2):
            assert torch.equal(fast(6, *loop_call()), expected)
        assert next(loop.transformer.num_calls) >= 2 * 2 * len(COMPUTED)
        assert "called as it is, and nothing within it is captured; it cannot be captured: " in str(
            model.explain()
        )
        assert model.plan.depths == (2,) and not model.stats.fallbacks
        assert model.stats.reused == 8 and model.stats.nbytes == 0
    (record,) = (r for r in caplog.records if "cannot be captured" in r.message)
    assert "Uncapturable is called as it is (backend='original')" in record.message
    assert torch.equal(loop(6, *loop_call()), make_plain(loop)), "undone"


def make_plain(loop):
    plain = make_loop()
    return plain(6, *loop_call())


def test_hooks_that_move_weights_within_a_call():
    pipe, plain = WAN.make(), WAN.make()
    apply_group_offloading(pipe.transformer, CPU, CPU, "leaf_level")
    reference = pabc.compile_pipeline(plain, skip, backend="original")
    with pabc.compile_pipeline(pipe, skip, backend="eager") as fast:
        found = [WAN.run(fast) for _ in range(2)]
        assert "GroupOffloadingHook" in str(fast.models["transformer"].explain())
    expected = WAN.run(reference)
    assert torch.equal(found[0], expected) and torch.equal(found[1], expected)
    assert not torch.equal(WAN.run(WAN.make()), expected)
    assert fast.models["transformer"].stats.reused == 8


def test_what_is_within_such_a_model_cannot_be_reused():
    loop = make_loop()
    loop.transformer = Uncapturable(make_denoiser()).eval()
    with compile_eager(loop) as fast, pytest.raises(ValueError, match="latents: expected an input"):
        fast(6, *loop_call())
    schedules = iter([skip, lambda ts: pabc.Schedule.pyramid(ts, full=2)])
    with compile_eager(loop, lambda ts: next(schedules)(ts)) as fast:
        fast(6, *loop_call())
        with pytest.raises(
            ValueError, match=r"expected only kind 'model'.*since it cannot be captured"
        ):
            fast(6, *loop_call())


def test_a_graph_with_hooks_that_look_on_is_called_as_it_is(caplog):
    loop, seen = make_loop(), []
    loop.transformer.blocks[0].register_forward_hook(lambda *_: seen.append(None))
    with caplog.at_level(logging.WARNING, "pabc"), compile_eager(loop, skip) as fast:
        for _ in range(2):
            seen.clear()
            assert torch.equal(fast(6, *loop_call()), run_by_hand(make_denoiser()))
            assert len(seen) == 2 * len(COMPUTED)
    (record,) = (r for r in caplog.records if "called as it is" in r.message)
    assert "its graph cannot be skipped as a whole: " in record.message


def test_a_model_that_can_be_captured_is_captured():
    loop = make_loop()
    with compile_eager(loop, skip) as fast:
        fast(6, *loop_call())
        assert fast.models["transformer"].stats.captures == 1


@pytest.mark.parametrize("compiled", ["not", "around", "in place"])
def test_a_pipeline_may_ask_for_it(compiled):
    loop = make_loop()
    expected = run_by_hand(make_denoiser())
    if compiled == "around":
        loop.transformer = torch.compile(loop.transformer, backend="eager")
    if compiled == "in place":
        loop.transformer.compile(backend="eager")
    before = vars(loop.transformer).get("_compiled_call_impl")
    with pabc.compile_pipeline(loop, skip, backend="original") as fast:
        for _ in range(2):
            assert torch.equal(fast(6, *loop_call()), expected)
        stats = fast.models["transformer"].stats
    assert stats.captures == 0 and stats.reused == 8
    assert vars(loop.transformer).get("_compiled_call_impl") is before


def test_two_experts_skip_calls_of_their_own():
    def model_of(step):
        return "transformer" if step < 3 else "transformer_2"

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = {"transformer": make_denoiser(), "transformer_2": make_denoiser(1)}
    loop = Loop(scheduler, **parts)
    mask = (False, True, True, False, True, True)
    calls = {}
    with pabc.compile_pipeline(
        loop, lambda ts: pabc.Schedule.from_masks(ts, {"model": mask}), backend="original"
    ) as fast:
        found = fast(6, *loop_call(), model_of=model_of)
        calls = {name: m.stats.computed for name, m in fast.models.items()}
    assert calls == {"transformer": 2, "transformer_2": 2} and torch.isfinite(found).all()


def test_compile_says_what_helps_and_falls_back_nowhere():
    model = Uncapturable(make_denoiser()).eval()
    latents, first, _ = loop_call()
    call = latents, torch.tensor([900.0]), first
    only_calls = pabc.Schedule.skip(range(3), (0, 1))
    fast = pabc.compile(model, only_calls, backend="eager")
    with torch.no_grad(), pytest.raises(ValueError, match="or use backend='original'"):
        fast(*call)
    fast = pabc.compile(model, pabc.Schedule.pyramid(range(3), full=2), backend="eager")
    with torch.no_grad(), pytest.raises(ValueError, match="latents: expected an input") as caught:
        fast(*call)
    assert "original" not in str(caught.value)
    wan = WAN.make().transformer
    apply_group_offloading(wan, CPU, CPU, "leaf_level")
    with pytest.raises(ValueError, match=r"GroupOffloadingHook.*or use backend='original'"):
        pabc.compile(wan, only_calls)
