"""Generations of the tiny model: calls told by a seed and a step, and what they must give."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import pabc

TIMESTEPS = (900.0, 700.0, 500.0, 300.0, 100.0)
SCHEDULE = pabc.Schedule.pyramid(TIMESTEPS, full=2, mlp=3)


def compile_eager(
    model: nn.Module, schedule: pabc.Schedule = SCHEDULE, **options: Any
) -> pabc.CompiledModel:
    return pabc.compile(model, schedule, backend="eager", **options)


def make_call(seed: int, step: int, tokens: int = 6, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Latents and timesteps."""
    generator = torch.Generator().manual_seed(100 * seed + step)
    return torch.randn(batch, tokens, 4, generator=generator), torch.full((batch,), TIMESTEPS[step])


def generate(
    fast: nn.Module, seed: int, tokens: int = 6, steps: Iterable[int] = range(5)
) -> list[Tensor]:
    return [fast(*make_call(seed, step, tokens)) for step in steps]


def run_alone(model: nn.Module, seed: int, tokens: int = 6) -> list[Tensor]:
    """What the guarded graph gives in a generation with nothing else under way."""
    outputs = generate(pabc.compile(model, SCHEDULE, backend="oracle"), seed, tokens)
    assert not torch.equal(outputs[1], model(*make_call(seed, 1, tokens))), "nothing was reused"
    return outputs


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert all(map(torch.equal, found, expected)) and len(found) == len(expected)
