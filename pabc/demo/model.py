"""Defines what the demo needs of a trained model: to be sampled, judged and shown.

Shapes: B prompts, F frames, H = W pixels, and C colors (1 or 3).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from pabc.demo import sampling
from pabc.demo.folder import save
from pabc.demo.sampling import Callback, Progress, Transformer
from pabc.demo.text import Text
from pabc.schedule import Schedule

FRACTION = (0.15, 0.85)
"""The share of the steps, the middle 70 %, in which the demo's own pyramids reuse."""
Own = TypeVar("Own", bound="Model")


@dataclass(frozen=True)
class Reuse:
    """A schedule of the demo, and its description for readers."""

    schedule: Schedule
    about: str


class Model(ABC):
    """A trained transformer with its text embedding and scheduler.

    Attributes:
        name: what the command line calls it.
        about: a noun phrase for readers.
        judged: a sentence for readers on what `judge` returns.
        num_steps: the steps of a generation, unless asked otherwise.
        guidance: the scale of classifier-free guidance, unless asked otherwise.
        shape: the shape of one sample.
        examples: captions to begin with.
        step_options: arguments for the scheduler's `step`, where it takes them.
        transformer: the model, in eval mode.
        text: the text embedding.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    judged: ClassVar[str]
    num_steps: ClassVar[int]
    guidance: ClassVar[float]
    shape: ClassVar[tuple[int, ...]]
    examples: ClassVar[tuple[str, ...]]
    step_options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, transformer: nn.Module, scheduler: Any, text: Text) -> None:
        self.transformer, self.text = transformer, text
        self._scheduler = scheduler

    @property
    def scheduler(self) -> Any:
        """A new copy of the scheduler that the model was trained for."""
        return copy.deepcopy(self._scheduler)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.transformer.parameters()).device

    def freeze(self: Own, device: str | torch.device) -> Own:
        """Moves the model to `device` in eval mode, without gradients; returns it."""
        for part in (self.transformer, self.text):
            part.to(device).eval().requires_grad_(False)
        return self

    def save(self, folder: Path) -> None:
        """Writes the model in diffusers' folder layout."""
        save(folder, self.transformer, self._scheduler, self.text)

    def timesteps(self, num_steps: int | None = None) -> tuple[float, ...]:
        """Returns the timesteps of the model's own scheduler, first to last."""
        return sampling.find_timesteps(self.scheduler, num_steps or self.num_steps)

    def noise(self, seed: int, count: int) -> torch.Tensor:
        """Returns initial noise (count, ...); sample i depends on `seed` and i alone."""
        return sampling.draw_noise(self.shape, count, seed)

    def generate(
        self,
        transformer: Transformer | None,
        prompts: list[str],
        noise: torch.Tensor,
        *,
        scheduler: Any = None,
        num_steps: int | None = None,
        guidance: float | None = None,
        progress: Progress | None = None,
        callback: Callback | None = None,
    ) -> torch.Tensor:
        """Samples one picture or clip per prompt; returns them, (B, ...) in [-1, 1], on the CPU.

        Args:
            transformer: called in the place of the model's own; None: that one. It gets keywords
                only: hidden_states (2B, ...), the unconditional half first, timestep (2B,), those
                of `conditions`, and return_dict=False.
            prompts: captions.
            noise: (B, ...), from `noise`.
            scheduler: any of diffusers' schedulers; None: the model's own.
            num_steps: the scheduler's steps; None: the model's usual number.
            guidance: the scale; None: the model's usual one.
            progress: called after each step.
            callback: called after each step.

        Raises:
            ValueError: there is no prompt, or not one for each sample of `noise`.
            CaptionError: the model does not know a word.
        """
        self._check(prompts, noise)
        latents = sampling.sample(
            transformer if transformer is not None else self.transformer,
            scheduler if scheduler is not None else self.scheduler,
            noise.to(self.device),
            self.conditions(prompts),
            steps=num_steps or self.num_steps,
            guidance=self.guidance if guidance is None else guidance,
            step_options=self.step_options,
            progress=progress,
            callback=callback,
        )
        return latents.clamp(-1, 1).cpu()

    def _check(self, prompts: list[str], noise: torch.Tensor) -> None:
        if not prompts:
            raise ValueError("prompts: expected at least one caption, found none")
        if noise.shape != (len(prompts), *self.shape):
            raise ValueError(
                f"noise: expected shape {(len(prompts), *self.shape)}, found {tuple(noise.shape)}"
            )

    @abstractmethod
    def prompts(self, seed: int, count: int) -> list[str]:
        """Returns captions in a random order that depends on `seed`; few repeat."""

    @abstractmethod
    def check_prompt(self, prompt: str) -> None:
        """Raises CaptionError unless `prompt` says what a caption has to say, in known words."""

    @abstractmethod
    def conditions(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Returns the model's further arguments, (2B, ...), the unconditional half first."""

    @abstractmethod
    def judge(self, samples: torch.Tensor, prompts: list[str]) -> dict[str, float]:
        """Returns the shares of samples that show what their prompts say, by what is asked."""

    @abstractmethod
    def pictures(self, samples: torch.Tensor) -> torch.Tensor:
        """Returns samples as frames (B, F, H, W, 3) of uint8."""

    @abstractmethod
    def pyramids(self, timesteps: tuple[float, ...], *, mlp: bool) -> dict[str, Reuse]:
        """Returns pyramids of the model's kinds by name, the demo's own one last.

        `mlp` adds one that reuses MLPs too, behind it.
        """


def to_unit(values: torch.Tensor) -> torch.Tensor:
    """Returns values in [-1, 1] as values in [0, 1]."""
    return (values + 1) / 2


def to_bytes(values: torch.Tensor) -> torch.Tensor:
    """Returns values in [-1, 1] as uint8."""
    return ((values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
