"""Samples clips: DDIM with batched classifier-free guidance, one transformer call per step.

Shapes: B prompts, F = 8 frames, H = W = 16 pixels, L tokens, C channels of a token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Protocol

import torch

from pabc.demo.digits import CANVAS, FRAMES
from pabc.demo.latte import Demo

GUIDANCE = 2.5


class Transformer(Protocol):
    """The model that `sample` calls at every step."""

    def __call__(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        *,
        return_dict: bool,
    ) -> tuple[torch.Tensor, ...]:
        """Returns the velocity, shaped like `hidden_states`, in a tuple."""
        ...


def timesteps(demo: Demo, steps: int = 50) -> tuple[int, ...]:
    """Returns the timesteps that `sample` runs, first to last."""
    scheduler = copy.deepcopy(demo.scheduler)
    scheduler.set_timesteps(steps)
    return tuple(scheduler.timesteps.tolist())


def draw_noise(num: int, seed: int = 0) -> torch.Tensor:
    """Returns initial latents (num, 1, 8, 16, 16) on the CPU; clip i depends on `seed` and i."""
    shape = (1, FRAMES, CANVAS, CANVAS)
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + index) for index in range(num)]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


@torch.no_grad()
def sample(
    demo: Demo,
    prompts: list[str],
    *,
    transformer: Transformer | None = None,
    steps: int = 50,
    guidance: float = GUIDANCE,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    callback: Callable[[int, int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Samples clips (B, F, H, W) in [0, 1], one per prompt; returns them on the CPU.

    Args:
        demo: the model, its scheduler and its text embedding.
        prompts: captions, of the words in `pabc.demo.digits.WORDS`.
        transformer: called instead of `demo.transformer` with hidden_states (2B, 1, F, H, W), the
            first half conditional, timestep (2B,), encoder_hidden_states (2B, L, C) and
            return_dict=False.
        steps: DDIM steps.
        guidance: scale of classifier-free guidance; 1 is none (the batch is doubled even then).
        seed: of the initial noise.
        progress: called with (steps done, steps) after each step.
        callback: called with (i, timestep, latents (B, 1, F, H, W)) after each step.

    Raises:
        ValueError: no prompt, or a word that the model does not know.
    """
    if not prompts:
        raise ValueError("prompts: expected at least one caption, found none")
    denoise = transformer if transformer is not None else demo.transformer
    text = demo.text.encode([*prompts, *[""] * len(prompts)])
    scheduler = copy.deepcopy(demo.scheduler)
    scheduler.set_timesteps(steps)
    latents = draw_noise(len(prompts), seed).to(text.device)
    for index, timestep in enumerate(scheduler.timesteps.tolist()):
        batch = torch.cat([latents, latents])
        when = torch.full((len(batch),), timestep, device=text.device, dtype=torch.long)
        velocity = denoise(batch, when, text, return_dict=False)[0]
        conditional, unconditional = velocity.chunk(2)
        guided = unconditional + guidance * (conditional - unconditional)
        # Guidance pushes samples out of range. The scheduler clips them, and must derive the noise
        # from the clipped sample, or errors accumulate over many steps.
        (latents, *_) = scheduler.step(
            guided, timestep, latents, use_clipped_model_output=True, return_dict=False
        )
        if callback is not None:
            callback(index, timestep, latents)
        if progress is not None:
            progress(index + 1, steps)
    return ((latents[:, 0] + 1) / 2).clamp(0, 1).cpu()
