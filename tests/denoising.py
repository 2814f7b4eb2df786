"""Loops that denoise by Euler's rule, around a small smooth model, for calibrations."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

NUM_STEPS = 16
TIMESTEPS = tuple(1000.0 * (1 - step / NUM_STEPS) for step in range(NUM_STEPS))


class Denoiser(nn.Module):
    """A velocity that changes smoothly with the latents and the timestep."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(0.5 * torch.randn(8, 8, generator=generator))
        self.ticks = itertools.count()
        self.num_read = 0

    def count_calls(self) -> int:
        """How often the model itself was called since this was last asked."""
        tick = next(self.ticks)
        found, self.num_read = tick - self.num_read, tick + 1
        return found

    def forward(self, latents: Tensor, timestep: float, text: Tensor | None = None) -> Tensor:
        next(self.ticks)
        shift = 0.0 if text is None else text
        return torch.tanh(latents @ self.weight + timestep / 1000 + shift) + 0.3 * latents


def draw_noise(seed: int) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))


def sample(model: Any, seed: int, timesteps: tuple[float, ...] = TIMESTEPS) -> Tensor:
    """One call a step."""
    latents = draw_noise(seed)
    for timestep in timesteps:
        latents = latents - model(latents, timestep=timestep) / NUM_STEPS
    return latents


def sample_guided(model: Any, seed: int) -> dict[str, Any]:
    """Two named calls a step."""
    latents, text = draw_noise(seed), torch.linspace(-1, 1, 8)
    for timestep in TIMESTEPS:
        with model.cache_context("cond"):
            cond = model(latents, timestep=timestep, text=text)
        with model.cache_context("uncond"):
            uncond = model(latents, timestep=timestep, text=text / 2)
        latents = latents - (uncond + 2 * (cond - uncond)) / NUM_STEPS
    return {"images": latents.numpy(), "flagged": [False]}
