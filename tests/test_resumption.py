"""Resumed calibrations: with another `sample` than that of their notes, they are refused."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import PIPELINES, make_wan
from sampling_loops import Loop, make_denoiser
from torch import Tensor

import pabc

pytestmark = pytest.mark.runtime

WAN = next(pipeline for pipeline in PIPELINES if pipeline.name == "Wan")


class Rounded(Loop):
    """A loop under autocast."""

    def __call__(self, model: Any, seed: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().__call__(model, seed)


class Asked(Loop):
    """A loop with other prompts."""

    def __call__(self, model: Any, seed: int) -> Tensor:
        return super().__call__(lambda x, t, text: model(x, t, text=text + 1), seed)


LOOP = Loop("batched")
OTHERS = (
    (LOOP.but(guidance=3.3), "other inputs at step 1 (other sampler or guidance scale)"),
    (LOOP.but(order=2), "other inputs at step 2 (other sampler or guidance scale)"),
    (LOOP.but(num_steps=13), "timestep 923.077 where there was 916.667"),
    (LOOP.but(clips=3), "other inputs at step 0 (other prompts, noise or shapes)"),
    (Asked("batched"), "other inputs at step 0 (other prompts, noise or shapes)"),
    (Rounded("batched"), "float32, autocast to bfloat16 on cpu where there was float32"),
)


@pytest.mark.parametrize(("other", "found"), OTHERS, ids=range(len(OTHERS)))
@pytest.mark.parametrize("seeds", [(0,), (1,)])
def test_resuming_with_another_sample_is_refused(
    other: Loop, found: str, seeds: tuple[int, ...], tmp_path: Path
) -> None:
    notes, model = tmp_path / "notes.npz", make_denoiser()
    options = {"calls": 7, "floor": 1.0, "candidates": 1, "progress": False, "resume": notes}
    pabc.calibrate(LOOP, model, **options)
    expected = f"recorded in {notes} with seed 0, found {found}; use another file"
    with pytest.raises(ValueError, match=re.escape(expected)):
        pabc.calibrate(other, model, seeds=seeds, **options)
    pabc.calibrate(LOOP, model, seeds=seeds, **options)


def test_resuming_with_a_pipeline_of_other_steps_is_refused(tmp_path: Path) -> None:
    pipe = make_wan()

    def run(steps: int) -> Any:
        def sample(given: Any, seed: int) -> Any:
            generator = torch.Generator().manual_seed(seed)
            return WAN.run(given, steps, generator=generator)

        return sample

    options = {"calls": 7, "floor": 1.0, "candidates": 1, "progress": False}
    options["resume"] = tmp_path / "notes.npz"
    pabc.calibrate(run(12), pipe, **options)
    with pytest.raises(ValueError, match="found 13 steps where there were 12; use another file"):
        pabc.calibrate(run(13), pipe, **options)
    pabc.calibrate(run(12), pipe, **options)


def test_noise_that_a_sampler_adds_without_a_seed_may_be_resumed(tmp_path: Path) -> None:
    class Noisy(Loop):
        def guide(self, model: Any, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
            return super().guide(model, x, t, text) + torch.randn(x.shape) / 9

    model = make_denoiser()
    options = {"calls": 7, "floor": 1.0, "candidates": 1, "progress": False}
    options["resume"] = tmp_path / "notes.npz"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = pabc.calibrate(Noisy(), model, **options)
        assert pabc.calibrate(Noisy(), model, **options).chosen == first.chosen
