"""Samplers that clip: found from one transition, and replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from pipelines import PIPELINES
from torch import Tensor

import pabc
from pabc.calibration.clipping import find_clip

pytestmark = pytest.mark.runtime

LATTE = next(pipeline for pipeline in PIPELINES if pipeline.name == "Latte")


def draw(count: int, *sizes: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [size * torch.randn(count, generator=generator) for size in sizes]


def clipping(alpha: float) -> Callable[[Tensor, Tensor], Tensor]:
    """DDIM's update, which clips."""
    sigma, later = (1 - alpha**2) ** 0.5, alpha + 0.04

    def update(x: Tensor, g: Tensor) -> Tensor:
        return later * ((x - sigma * g) / alpha).clamp(-1, 1) + (1 - later**2) ** 0.5 * g

    return update


def error(alpha: float, noise: float, count: int) -> float | None:
    """The relative error of what changes make of the next latents; None: no clipping is found."""
    data, noisy, other, added, dx, dg = draw(count, 0.7, 1, 0.3, noise, 0.01, 0.01)
    x, g = alpha * data + (1 - alpha**2) ** 0.5 * noisy, noisy + other
    update = clipping(alpha)
    clip = find_clip([x], [g], [update(x, g) + added])
    expected = update(x + dx, g + dg) - update(x, g)
    if clip is None:
        return None
    (found,) = clip.change([x], [g], [dx], [dg])
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("count", [400, 6000])
def test_clipping_is_found(alpha: float, count: int) -> None:
    found = error(alpha, 0.0, count)
    assert found is not None and found < 5e-3


def test_clipping_is_found_in_noise() -> None:
    found = error(0.95, 0.2, 6000)
    assert found is not None and found < 0.15


@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_linear_samplers_do_not_clip(noise: float) -> None:
    x, other, added = draw(2000, 1, 0.6, noise)
    g = 0.8 * x + other
    assert find_clip([x], [g], [0.9 * x - 0.2 * g + added]) is None
    assert find_clip([x], [torch.zeros_like(x)], [x]) is None


@pytest.mark.parametrize(
    ("scheduler", "more", "margin"),
    [
        (diffusers.DDIMScheduler(), {}, 1.5),
        (diffusers.DDIMScheduler(), {"eta": 1.0}, 3.0),
        (diffusers.DDPMScheduler(), {}, 4.0),
        (diffusers.EulerAncestralDiscreteScheduler(), {}, 1.5),
    ],
    ids=["clips", "clips, adds noise", "DDPM", "adds noise"],
)
def test_plans_are_promised_what_they_give(scheduler: Any, more: Any, margin: float) -> None:
    """On the noise that was recorded, within some dB."""
    pipe = LATTE.make()
    pipe.scheduler = type(scheduler).from_config(scheduler.config)

    def run(given: Any) -> Tensor:
        torch.manual_seed(0)
        return LATTE.run(given, 12, generator=torch.Generator().manual_seed(0), **more)

    request = pabc.auto(calls=6, floor=1.0, cache=False, candidates=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pabc.compile_pipeline(pipe, request, backend="original") as fast:
            full, found = run(fast).double(), run(fast).double()
            (model,) = fast.models.values()
    said = float(model.stats.plan_source.partition(" dB when")[0].split()[-1])
    given = 20 * torch.log10((full.max() - full.min()) / (found - full).square().mean().sqrt())
    assert abs(said - float(given)) < margin, f"promised {said}, found {float(given)}"
