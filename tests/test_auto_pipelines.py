"""pabc.auto with diffusers' pipelines: a first generation is recorded, later ones follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from pipelines import PIPELINES, Pipeline, make_wan
from torch import Tensor

import pabc
from pabc.automatic import Auto
from pabc.pipelines import CompiledPipeline

pytestmark = pytest.mark.runtime

CASES = [
    pytest.param(pipeline, scheduler, id=f"{pipeline}, {scheduler}")
    for pipeline in PIPELINES
    for scheduler in pipeline.schedulers
]
WAN = next(pipeline for pipeline in PIPELINES if pipeline.name == "Wan")


def generate(pipeline: Pipeline, pipe: Any, seed: int, num_steps: int, **more: Any) -> Tensor:
    """Runs the pipeline on noise of this seed."""
    generator = torch.Generator().manual_seed(seed)
    given = pipeline.call(1, 0)
    name = "latents" if "latents" in given else "image"
    arguments = {name: torch.randn(given[name].shape, generator=generator), **more}
    return pipeline.run(pipe, num_steps, **arguments)


def make_auto(pipe: Any, **request: Any) -> CompiledPipeline:
    asked = {"floor": 1.0, "cache": False, "candidates": 2, **request}
    return pabc.compile_pipeline(pipe, pabc.auto(**asked), backend="original")


def counts(fast: CompiledPipeline) -> tuple[int, int]:
    """Returns how many generations were recorded, and how many calls were skipped."""
    stats = [model.stats for model in fast.models.values()]
    return stats[0].recorded, sum(each.reused for each in stats)


@pytest.mark.parametrize(("pipeline", "name"), CASES)
def test_the_second_generation_follows_the_plan(pipeline: Pipeline, name: str) -> None:
    scheduler, runs = pipeline.schedulers[name]
    num_steps = 12 if runs(12) == 12 else 8
    total = runs(num_steps)
    pipe = pipeline.make()
    pipe.scheduler = scheduler.from_config(scheduler.config)
    plain = [generate(pipeline, pipe, seed, num_steps) for seed in range(2)]
    with make_auto(pipe, calls=total - total // 3) as fast:
        assert torch.equal(generate(pipeline, fast, 0, num_steps), plain[0])
        assert counts(fast) == (1, 0), "the plan is made where the generation ends"
        found = generate(pipeline, fast, 1, num_steps)
        recorded, skipped = counts(fast)
        source = next(iter(fast.models.values())).stats.plan_source
    assert (recorded, skipped) == (1, total // 3 * pipeline.calls), source
    assert f"of {total} steps" in source
    assert float((found - plain[1]).abs().max()) > 0
    assert torch.equal(generate(pipeline, pipe, 1, num_steps), plain[1]), "undone"


def test_the_plan_that_is_kept_is_the_one_that_is_followed(tmp_path: Path) -> None:
    pipe = make_wan()
    with make_auto(pipe, calls=7, cache=tmp_path) as fast:
        generate(WAN, fast, 0, 12)
        found = generate(WAN, fast, 1, 12)
    (file,) = tmp_path.rglob("*.npz")
    schedule = pabc.Calibration.load(file).schedule()
    with pabc.compile_pipeline(pipe, schedule, backend="original") as fast:
        assert torch.equal(generate(WAN, fast, 1, 12), found)


def test_one_step_is_no_longer_generation() -> None:
    """Its one timestep is the first of the plan's."""
    pipe = make_wan()
    plain = [generate(WAN, pipe, 0, num_steps) for num_steps in (12, 1)]
    with make_auto(pipe, calls=7) as fast:
        assert torch.equal(generate(WAN, fast, 0, 12), plain[0])
        assert torch.equal(generate(WAN, fast, 0, 1), plain[1])
        assert not torch.equal(generate(WAN, fast, 0, 12), plain[0]), "the plan is there"


def test_settings_of_the_sampler_are_recorded_apart() -> None:
    pipe = make_wan()
    with make_auto(pipe, calls=7) as fast:
        generate(WAN, fast, 0, 12)
        assert counts(fast) == (1, 0)
        generate(WAN, fast, 1, 10)
        assert counts(fast) == (2, 0), "another number of steps"
        pipe.scheduler = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
        generate(WAN, fast, 2, 12)
        assert counts(fast) == (3, 0), "another sampler"
        pipe.scheduler = make_wan().scheduler
        generate(WAN, fast, 3, 12)
        assert counts(fast) == (3, 10), "the first plan is known"
        generate(WAN, fast, 4, 12, guidance_scale=9.0)
        assert counts(fast) == (4, 10), "another guidance scale"
        generate(WAN, fast, 5, 12, guidance_scale=9.0)
        generate(WAN, fast, 6, 12)
        recorded, skipped = counts(fast)
        assert recorded == 4, "each scale follows its own plan"
        assert 28 <= skipped <= 30, "what the plan that was left did not keep is computed"


def test_autocast_is_recorded_apart() -> None:
    with make_auto(make_wan(), calls=7) as fast:
        for seed, enabled in enumerate((True, False, False, True)):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                found = generate(WAN, fast, seed, 12)
                plain = generate(WAN, make_wan(), seed, 12) if seed == 1 else found
            assert torch.equal(found, plain)
            assert counts(fast) == ((1, 0), (2, 0), (2, 10), (2, 20))[seed]


def test_a_generation_that_raises_is_not_planned() -> None:
    pipe = make_wan()

    def fail(pipe: Any, step: int, timestep: Any, kwargs: Any) -> dict[str, Any]:
        if step == 5:
            raise KeyError("enough")
        return {}

    with make_auto(pipe, calls=7) as fast:
        with pytest.raises(KeyError):
            generate(WAN, fast, 0, 12, callback_on_step_end=fail)
        assert counts(fast) == (0, 0)
        generate(WAN, fast, 0, 12)
        assert counts(fast) == (1, 0)


def test_called_through_the_pipeline_itself() -> None:
    """`pipe(...)` is compiled in place: its generation ends where the next one begins."""
    pipe = make_wan()
    with make_auto(pipe, calls=7) as fast:
        generate(WAN, pipe, 0, 12)
        generate(WAN, pipe, 1, 12)
        assert counts(fast) == (1, 10)


def test_captured_backends_follow_the_same_plan() -> None:
    results = []
    for backend in ("original", "eager"):
        torch.manual_seed(0)
        pipe = make_wan()
        request = pabc.auto(calls=7, floor=1.0, cache=False, candidates=2)
        with pabc.compile_pipeline(pipe, request, backend=backend) as fast:
            generate(WAN, fast, 0, 12)
            results.append(generate(WAN, fast, 1, 12))
            assert counts(fast) == (1, 10)
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-4)


def test_the_sharded_are_refused() -> None:
    class Sharded:
        is_sharded = True

    request = pabc.auto()
    assert isinstance(request, Auto)
    with pytest.raises(ValueError, match=r"transformer: expected one process .* found a mesh"):
        request.plans_for({"transformer": Sharded()})  # type: ignore[dict-item]
