"""Defines what a variant of a sampling loop is made from, and what it is made into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from workloads import OnStep, Start, Workload, denoise, no_context

import pabc


@dataclass(frozen=True)
class Case:
    """The model of a variant, and the loop that it runs in.

    Attributes:
        computed: the number of calls that variants compute which skip others.
    """

    workload: Workload
    model: nn.Module
    start: Start
    schedule: pabc.Schedule
    computed: int = 1

    @property
    def num_steps(self) -> int:
        """The number of steps of the loop."""
        return self.schedule.num_steps

    def generate(self, ready: Ready) -> Tensor:
        """Runs one generation of a model that is ready; returns its last latents."""
        steps = ready.num_steps or self.num_steps
        return denoise(self.workload, ready.call, self.start, steps, ready.on_step)

    @property
    def example(self) -> dict[str, Any]:
        """The arguments of the first call."""
        latents = torch.cat([self.start.latents] * 2)
        scheduler = self.workload.scheduler()
        scheduler.set_timesteps(self.num_steps, device=latents.device)
        when = scheduler.timesteps[0].expand(len(latents))
        return self.workload.call(latents, when, self.start.text)

    @property
    def window(self) -> tuple[float, float]:
        """The schedule's window in timesteps, with strict bounds: the steps just outside of it."""
        steps = self.schedule.timesteps
        reused = [i for kind in self.workload.ranges for i, r in enumerate(self._mask(kind)) if r]
        inside = range(min(reused, default=0), max(reused, default=-1) + 1)
        high = steps[inside.start - 1] if inside.start else float("inf")
        low = steps[inside.stop] if inside.stop < len(steps) else float("-inf")
        return low, high

    def _mask(self, kind: str) -> tuple[bool, ...]:
        return self.schedule.mask(kind)


@dataclass
class Ready:
    """A model that is ready for sampling.

    Attributes:
        call: the function to call in place of the model.
        on_step: returns a context that is entered around each step.
        on_end: is called after each generation.
        note: a remark on the row for its readers.
        num_steps: the number of steps, if it is not the loop's.
    """

    call: Callable[..., Any]
    on_step: OnStep = no_context
    on_end: Callable[[], None] = lambda: None
    note: str = ""
    num_steps: int | None = None


def first_line(error: BaseException) -> str:
    """Returns an error as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return text if len(text) <= 160 else text[:157] + "..."
