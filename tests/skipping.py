"""Whole calls that are skipped, by hand: the model itself, and what its last results give."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import pabc

TIMESTEPS = (900.0, 750.0, 600.0, 500.0, 350.0, 200.0, 100.0)
MASK = (False, False, True, False, True, True, False)
"""True where a step skips the call."""
HOLD = pabc.Schedule.from_masks(TIMESTEPS, {"model": MASK})


class SkipByHand:
    """A model that is called where the mask says so, and else gives copies of its last result."""

    def __init__(self, model: Callable[..., Any], mask: Iterable[bool] = MASK) -> None:
        self.model, self.mask = model, iter(mask)
        self.last: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not next(self.mask):
            self.last = pytree.tree_map(copy, self.model(*args, **kwargs))
        return pytree.tree_map(copy, self.last)


def copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def skip_calls(
    model: nn.Module, schedule: pabc.Schedule = HOLD, **options: Any
) -> pabc.CompiledModel:
    return pabc.compile(model, schedule, backend="original", **options)


def step_inputs(step: int, batch: int = 2, tokens: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Latents and timesteps."""
    generator = torch.Generator().manual_seed(100 * seed + step)
    latents = torch.randn(batch, tokens, 4, generator=generator)
    return latents, torch.full((batch,), TIMESTEPS[step])


@torch.no_grad()
def generate(model: Callable[..., Any], steps: Iterable[int] = range(7), **more: Any) -> list[Any]:
    return [model(*step_inputs(step, **more)) for step in steps]


def assert_alike(found: Sequence[Any], expected: Sequence[Any]) -> None:
    """Checks results: their types and tensors, bit for bit, and all else."""
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert type(mine) is type(theirs)
        leaves, form = pytree.tree_flatten(mine)
        others, expected_form = pytree.tree_flatten(theirs)
        assert form == expected_form
        for a, b in zip(leaves, others, strict=True):
            assert torch.equal(a, b) if isinstance(b, Tensor) else a == b


class ForecastByHand:
    """A model that is called at the steps in `computed`, and else foretold from its last results.

    The polynomial through as many points as there are, `num_points` at most, goes over the indices
    of the steps. Results are tensors.
    """

    def __init__(
        self, model: Callable[..., Tensor], computed: Iterable[int], num_points: int
    ) -> None:
        self.model, self.computed, self.num_points = model, set(computed), num_points
        self.step = 0
        self.kept: list[tuple[int, Tensor]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        step, self.step = self.step, self.step + 1
        if step in self.computed:
            found = self.model(*args, **kwargs)
            self.kept = [(step, found.clone()), *self.kept][: self.num_points]
            return found
        wide = torch.promote_types(self.kept[0][1].dtype, torch.float32)
        total = sum(value.to(wide) * self.weight(step, at) for at, value in self.kept)
        return total.to(self.kept[0][1].dtype)

    def weight(self, step: int, at: int) -> Tensor:
        others = [other for other, _ in self.kept if other != at]
        factors = [Fraction(step - other, at - other) for other in others]
        return torch.tensor(float(math.prod(factors, start=Fraction(1))), dtype=torch.float32)
