"""Samples with any of diffusers' schedulers: batched guidance, one call of the model per step.

Shapes: B prompts; latents (B, ...), of which the model sees 2B, the unconditional half first, as in
diffusers' pipelines.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch


class Transformer(Protocol):
    """The model that `sample` calls at every step."""

    def __call__(
        self,
        *,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        return_dict: bool,
        **conditions: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Returns the prediction, shaped like `hidden_states`, in a tuple."""
        ...


Progress = Callable[[int, int], Any]
"""Is called with the number of calls that were made and that there are."""
Callback = Callable[[int, float, torch.Tensor], Any]
"""Is called with the index of the call, its timestep and the latents after it."""


def draw_noise(shape: tuple[int, ...], num: int, seed: int = 0) -> torch.Tensor:
    """Returns noise (num, *shape) on the CPU; sample i depends on `seed` and i alone."""
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + index) for index in range(num)]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def find_timesteps(scheduler: Any, steps: int) -> tuple[float, ...]:
    """Returns the timesteps of all calls, first to last; sets those of `scheduler`."""
    scheduler.set_timesteps(steps)
    return tuple(scheduler.timesteps.tolist())


@torch.no_grad()
def sample(
    transformer: Transformer,
    scheduler: Any,
    noise: torch.Tensor,
    conditions: Mapping[str, torch.Tensor],
    *,
    steps: int,
    guidance: float,
    step_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    callback: Callback | None = None,
) -> torch.Tensor:
    """Returns the latents (B, ...) at the end of the scheduler's steps.

    Args:
        transformer: the model.
        scheduler: any scheduler of diffusers, whose timesteps are set here. One of the second order
            that calls the model twice a step has more timesteps than steps.
        noise: (B, ...), with a standard deviation of 1.
        conditions: further arguments of the model, (2B, ...), the unconditional half first.
        steps: the number of steps.
        guidance: the scale of classifier-free guidance; 1 is none (the batch is doubled even then).
        step_options: arguments for `scheduler.step`, where it takes them.
        progress: called after each step.
        callback: called after each step.
    """
    timesteps = find_timesteps(scheduler, steps)
    options = _select_options(scheduler, step_options or {})
    latents = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for index, timestep in enumerate(timesteps):
        scaled = _scale(scheduler, latents, scheduler.timesteps[index])
        prediction = transformer(
            hidden_states=torch.cat([scaled, scaled]),
            timestep=torch.full((2 * len(latents),), timestep, device=latents.device),
            **conditions,
            return_dict=False,
        )[0]
        unconditional, conditional = prediction.chunk(2)
        guided = unconditional + guidance * (conditional - unconditional)
        (latents, *_) = scheduler.step(
            guided, scheduler.timesteps[index], latents, **options, return_dict=False
        )
        if callback is not None:
            callback(index, timestep, latents)
        if progress is not None:
            progress(index + 1, len(timesteps))
    return latents


def _scale(scheduler: Any, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Returns the model's input; flow matching's schedulers have no scale."""
    if not hasattr(scheduler, "scale_model_input"):
        return latents
    return scheduler.scale_model_input(latents, timestep)


def _select_options(scheduler: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    known = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in options.items() if name in known}
