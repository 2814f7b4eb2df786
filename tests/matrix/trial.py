"""A row that is tried: what several columns need of it, made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import pabc

from .row import NUM_STEPS, Cell, Row


class Trial:
    """A row, and what several columns need of it, made once.

    Attributes:
        row: the row.
        plain: the plain pipeline.
    """

    def __init__(self, row: Row) -> None:
        self.row = row
        self._outputs: dict[tuple[int, int, int], Tensor] = {}

    @cached_property
    def plain(self) -> Any:
        return self.row.make()

    def expected(self, seed: int = 0, num_steps: int = NUM_STEPS, size: int = 0) -> Tensor:
        """Returns what the plain pipeline gives."""
        key = seed, num_steps, size
        if key not in self._outputs:
            made = self.row.run(self.plain, seed=seed, num_steps=num_steps, size=size)
            assert made.isfinite().all(), "the small pipeline's latents are not finite"
            self._outputs[key] = made
        return self._outputs[key]

    @cached_property
    def captured(self) -> Captured:
        """The pipeline with captured models, after a generation that reused nothing."""
        return Captured(self.row)


class Captured:
    """A compiled pipeline whose schedule is set from outside, and what it gave first."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.make_schedule: Callable[..., pabc.Schedule] = pabc.Schedule.none
        self.pipe = pabc.compile_pipeline(
            row.make(), lambda ts: self.make_schedule(ts), backend="eager"
        )
        self.first = row.run(self.pipe)
        self.models = list(self.pipe.models.values())
        self.explanations = [model.explain() for model in self.models]

    @property
    def kinds(self) -> list[str]:
        return sorted({region.kind for each in self.explanations for region in each.regions})

    def run(self, make_schedule: Callable[..., pabc.Schedule], **asked: Any) -> Tensor:
        self.make_schedule = make_schedule
        return self.row.run(self.pipe, **asked)


def is_equal(found: Tensor, expected: Tensor) -> Cell:
    if torch.equal(found, expected):
        return "yes"
    return f"no: differs by {(found - expected).abs().max().item():.1e}"


def describe(error: Exception) -> str:
    """Returns the first line of an error."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
