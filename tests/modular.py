"""A modular pipeline of diffusers around a small Wan transformer, and guiders that drive it.

No text encoder and no VAE: its blocks are those from embeddings to latents.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import torch
from diffusers import guiders
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
from diffusers.modular_pipelines.wan.modular_blocks_wan22 import Wan22CoreDenoiseStep
from pipelines import WAN_KINDS, ByHand, build, noise, text
from torch import Tensor

NUM_STEPS = 6
SKIPPED = diffusers.LayerSkipConfig([1])
"""The second of two layers."""
GUIDERS: dict[str, Callable[[], Any]] = {
    "classifier-free": guiders.ClassifierFreeGuidance,
    "classifier-free, for a part of the steps": lambda: guiders.ClassifierFreeGuidance(
        start=0.2, stop=0.7
    ),
    "zero-star": guiders.ClassifierFreeZeroStarGuidance,
    "adaptive projected": lambda: guiders.AdaptiveProjectedGuidance(
        adaptive_projected_guidance_momentum=-0.5
    ),
    "adaptive projected, mixed": guiders.AdaptiveProjectedMixGuidance,
    "tangential": guiders.TangentialClassifierFreeGuidance,
    "skip-layer": lambda: guiders.SkipLayerGuidance(
        skip_layer_config=SKIPPED, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=0.7
    ),
    "skip-layer, longer than classifier-free": lambda: guiders.SkipLayerGuidance(
        skip_layer_config=SKIPPED,
        skip_layer_guidance_start=0.3,
        skip_layer_guidance_stop=1.0,
        stop=0.7,
    ),
    "auto-guidance": lambda: guiders.AutoGuidance(auto_guidance_config=SKIPPED),
}
"""Those that can be made without other packages, and run Wan with diffusers alone."""


def make_modular(guider: Any) -> Any:
    pipe = WanCoreDenoiseStep().init_pipeline()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    model = build("Wan", num_layers=2)
    pipe.update_components(transformer=model, scheduler=scheduler, guider=guider)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_modular_experts() -> Any:
    """Two experts, with a guider for each: both skip layers."""
    pipe = Wan22CoreDenoiseStep().init_pipeline()
    first, second = build("Wan", num_layers=2), build("Wan", num_layers=2)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(0.9)
    guides = {"guider": GUIDERS["skip-layer"](), "guider_2": GUIDERS["auto-guidance"]()}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.update_components(transformer=first, transformer_2=second, scheduler=scheduler, **guides)
    pipe.set_progress_bar_config(disable=True)
    return pipe


MODULAR_CALL = {
    "prompt_embeds": text(1, 0),
    "negative_prompt_embeds": text(1, 1),
    "latents": noise(1, 4, 3, 6, 8),
    "height": 48,
    "width": 64,
    "num_frames": 9,
}


def run_modular(pipe: Any, num_steps: int = NUM_STEPS) -> Tensor:
    return pipe(**MODULAR_CALL, num_inference_steps=num_steps, output="latents")


def modular_masks(num_steps: int) -> dict[str, list[bool]]:
    """A rhythm for each kind, and one step without reuse before the last."""
    return {
        kind: [step % (2 + i) != 0 and step != num_steps - 2 for step in range(num_steps)]
        for i, kind in enumerate(sorted(set(WAN_KINDS.values())))
    }


def predictions(guider: Any) -> Iterator[tuple[str, int]]:
    """The name and step of each call, as the guider prepares them."""
    waiting: deque[tuple[str, int]] = deque()
    prepare = guider.prepare_inputs_from_block_state

    def note(*args: Any) -> list[Any]:
        batches = prepare(*args)
        waiting.extend((getattr(b, guider._identifier_key), guider._step) for b in batches)
        return batches

    guider.prepare_inputs_from_block_state = note
    return iter(waiting.popleft, None)


def run_modular_by_hand(guider: Any) -> Tensor:
    pipe = make_modular(guider)
    model, masks = pipe.transformer, modular_masks(NUM_STEPS)
    for name in ("prepare_models", "cleanup_models"):  # which look for layers by their full names
        change = getattr(guider, name)
        setattr(guider, name, lambda _, change=change: change(model))
    pipe.transformer = ByHand(model, WAN_KINDS, masks, predictions(guider))
    with torch.no_grad():
        return run_modular(pipe)
