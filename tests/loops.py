"""A loop that asks what diffusers' pipelines ask, around a small model, and its cache by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import diffusers
import torch
from models import Branch, Cross, Image, Mlp
from pipelines import TEXT, ByHand, Masks, noise, text
from torch import Tensor, nn

import pabc
from pabc.pipelines import CompiledPipeline

LOOP_KINDS = {"blocks.0.cut": "full", "blocks.1.only": "cross", "blocks.2.cut": "mlp"}
LOOP_MASKS = {"full": (0, 1), "cross": (0, 1, 1), "mlp": (0, 0, 1)}
"""Kind -> whether it reuses, over and over."""


def loop_masks(num_steps: int) -> dict[str, list[bool]]:
    return {
        kind: [bool(rhythm[step % len(rhythm)]) for step in range(num_steps)]
        for kind, rhythm in LOOP_MASKS.items()
    }


def loop_schedule(timesteps: tuple[float, ...]) -> pabc.Schedule:
    return pabc.Schedule.from_masks(timesteps, loop_masks(len(timesteps)))


def make_denoiser(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Image(Branch(), Cross(), Mlp()).eval()


def loop_call(batch: int = 1, num_texts: int = 2) -> tuple[Tensor, ...]:
    """Latents and texts."""
    return noise(batch, 3, 4, 6), *(text(batch, seed, TEXT, 16) for seed in range(num_texts))


class Loop:
    """What is asked of a pipeline, and no more: guidance as two calls a step, maybe two experts."""

    def __init__(self, scheduler: Any, **models: nn.Module | None) -> None:
        self.scheduler = scheduler
        vars(self).update(models)

    @property
    def components(self) -> dict[str, Any]:
        return dict(vars(self))

    @torch.no_grad()
    def __call__(
        self,
        num_steps: int,
        latents: Tensor,
        *texts: Tensor,
        start: int = 0,
        guided: Callable[[int], bool] = lambda _: True,
        alone: int = 0,
        text_of: Callable[[Tensor, int], Tensor] = lambda text, _: text,
        model_of: Callable[[int], str] = lambda _: "transformer",
        scheduler: Any = None,
        callback: Callable[[int], None] = lambda _: None,
    ) -> Tensor:
        self.scheduler.set_timesteps(num_steps)
        scheduler = scheduler or self.scheduler
        timesteps = self.scheduler.timesteps[start:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        for i, t in enumerate(timesteps):
            model = getattr(self, model_of(i))
            scales = hasattr(scheduler, "scale_model_input")
            given = scheduler.scale_model_input(latents, t) if scales else latents
            when = t.expand(len(latents)).float()
            used = texts if guided(i) else texts[alone : alone + 1]
            found = [model(given, when, text_of(text, i)) for text in used]
            latents = scheduler.step(sum(found) / len(found), t, latents, return_dict=False)[0]
            callback(i)
        return latents


def make_loop() -> Loop:
    return Loop(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=make_denoiser())


ALL_STEPS = [(branch, step) for step in range(6) for branch in range(2)]
"""Branch and step of each call, in six guided steps."""


def compile_eager(pipe: Any, schedule: Any = loop_schedule, **options: Any) -> CompiledPipeline:
    return pabc.compile_pipeline(pipe, schedule, backend="eager", **options)


def loop_by_hand(
    loop: Loop,
    where: Iterable[tuple[int, int]],
    num_steps: int,
    *call: Tensor,
    masks: Masks | None = None,
    **more: Any,
) -> Tensor:
    """The plain loop with its models cached by hand."""
    names = [name for name in vars(loop) if name.startswith("transformer")]
    masks, where = masks or loop_masks(num_steps), iter(where)
    by_hand = {name: ByHand(vars(loop)[name], LOOP_KINDS, masks, where) for name in names}
    scheduler = copy.deepcopy(loop.scheduler)
    return Loop(scheduler, **by_hand)(num_steps, *call, **more)
