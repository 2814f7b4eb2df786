"""Generations of made-up models, and what is recorded of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pabc.calibration.recording import Recorder, Recording


def record_outputs(outputs: np.ndarray | torch.Tensor, **settings: Any) -> Recording:
    """Records outputs [n, elements] of one branch, whose sampler adds each to the latents."""
    outputs = torch.as_tensor(np.asarray(outputs), dtype=torch.float64)
    recorder, x = Recorder(), torch.zeros_like(outputs[0])
    for step, output in enumerate(outputs):
        recorder.add_input(step, x)
        recorder.add_output("only", step, output)
        x = x + output
    return recorder.finish(range(len(outputs)), x, **settings)


def draw_smooth(num_steps: int, *, elements: int = 40, seed: int = 0) -> np.ndarray:
    """Returns vectors [num_steps, elements] that change smoothly, and faster at both ends."""
    random = np.random.default_rng(seed)
    times = np.linspace(0, 1, num_steps)[:, None]
    rates = np.geomspace(0.5, 30.0, 10)
    waves = np.cos(rates * times + random.uniform(0, 6, rates.shape)) * 0.6 ** np.arange(10)
    waves[:, :5] += np.exp(-12 * times) + np.exp(-9 * (1 - times))
    return waves @ random.normal(size=(10, elements))


def make_model(elements: int = 64, seed: int = 0) -> Callable[..., torch.Tensor]:
    """Returns a smooth model of latents, time in [0, 1], and a condition."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (
        torch.randn(elements, elements, generator=generator, dtype=torch.float64) / elements**0.5
        for _ in range(2)
    )

    def model(x: torch.Tensor, time: float, condition: float) -> torch.Tensor:
        hidden = torch.tanh(x @ first + condition + np.sin(5 * time))
        return (hidden @ second).to(x.dtype) + 0.2 * time * x

    return model


def sample(
    scheduler: Any,
    *,
    num_steps: int = 12,
    guidance: float = 3.5,
    elements: int = 64,
    dtype: torch.dtype = torch.float64,
) -> tuple[Recording, list[torch.Tensor]]:
    """Records a generation of `make_model` with two branches; returns all latents as well."""
    model = make_model(elements)
    scheduler.set_timesteps(num_steps)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, elements, generator=generator, dtype=torch.float64).to(dtype)
    recorder, latents = Recorder(), []
    timesteps = scheduler.timesteps.tolist()
    for step, timestep in enumerate(timesteps):
        recorder.add_input(step, x)
        latents.append(x)
        time = float(timestep) / 1000
        yes, no = (model(x.double(), time, each).to(dtype) for each in (0.4, 0.0))
        recorder.add_output("yes", step, yes)
        recorder.add_output("no", step, no)
        x = scheduler.step(no + guidance * (yes - no), timestep, x, return_dict=False)[0]
    latents.append(x)
    return recorder.finish(timesteps, x), latents
