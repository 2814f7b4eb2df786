"""Which step each call is, told from the calls alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from pabc.base.structure import flatten
from pabc.calibration.steps import ReadNumbers, Steps
from pabc.runtime.timesteps import TimestepArguments


class Loop:
    """A loop that calls a model, and what is told of its calls: (is new, step, order)."""

    def __init__(self, speed: float = 1.0) -> None:
        self.speed = speed
        self.steps = Steps(ReadNumbers(TimestepArguments()))
        self.x = torch.zeros(1, 4)

    def call(
        self, t: Any, name: str | None = None, text: float = 0.0, stated: int | None = None
    ) -> tuple[bool, int, int]:
        args = (self.x, t, torch.full((1, 3), text), 7)
        leaves, structure = flatten((args, {}))
        found = self.steps.begin(name, leaves, structure, stated)
        self.steps.end(name, leaves, (self.x + 1) * self.speed)
        return found.is_new, found.index, found.order

    def run(self, timesteps: Iterable[Any], names: Iterable[str | None] = (None,)) -> list[Any]:
        found = []
        for t in timesteps:
            found += [self.call(t, name, i) for i, name in enumerate(names)]
            self.x += self.speed  # in place, as loops may
        return found


@pytest.mark.parametrize("form", [float, torch.tensor, lambda t: torch.tensor([t, t])])
def test_one_call_a_step_and_generations(form: Any) -> None:
    loop, timesteps = Loop(), [9.0, 6.0, 3.0]
    given = [form(t) for t in timesteps]
    assert loop.run(given) == [(True, 0, 0), (False, 1, 0), (False, 2, 0)]
    assert loop.steps.timesteps == (9, 6, 3)
    assert loop.run(given) == [(True, 0, 0), (False, 1, 0), (False, 2, 0)]


@pytest.mark.parametrize("names", [("cond", "uncond"), (None, None)])
def test_two_calls_a_step(names: tuple[str | None, ...]) -> None:
    found = Loop().run([9.0, 6.0], names)
    orders = [0, 0] if names[0] else [0, 1]
    expected = [(i == 0 and k == 0, i, orders[k]) for i in range(2) for k in range(2)]
    assert found == expected


def test_a_name_that_rests() -> None:
    loop = Loop()
    loop.run([9.0], ("cond", "uncond"))
    assert loop.run([6.0], ("cond",)) == [(False, 1, 0)]
    assert loop.run([3.0], ("uncond", "cond")) == [(False, 2, 0), (False, 2, 0)]


def test_repeated_timesteps_of_a_second_order_sampler() -> None:
    """The latents tell a second evaluation from a second branch."""
    loop = Loop()
    assert [index for _, index, _ in loop.run([9.0, 6.0, 6.0, 3.0, 3.0])] == [0, 1, 2, 3, 4]
    both = Loop().run([9.0, 6.0, 6.0], (None, None))
    assert [index for _, index, _ in both] == [0, 0, 1, 1, 2, 2]


def test_without_a_timestep() -> None:
    loop = Loop()
    assert [index for _, index, _ in loop.run([5.0, 5.0, 5.0])] == [0, 1, 2]
    assert loop.steps.path is None and loop.steps.timesteps == (0, 1, 2)
    loop.steps.restart()
    assert loop.run([5.0]) == [(True, 0, 0)]


@pytest.mark.parametrize("names", [(None,), ("cond", "uncond"), (None, None)])
def test_latents_that_outputs_of_zero_leave_as_they_are(names: tuple[str | None, ...]) -> None:
    """The timestep tells the steps; that another text is read as another number does not."""
    found = Loop(speed=0.0).run([9.0, 6.0, 3.0], names)
    assert [index for _, index, _ in found] == [i for i in range(3) for _ in names]


def test_latents_that_stay_for_one_step() -> None:
    loop = Loop()
    loop.run([9.0, 6.0], (None, None))
    steps = [loop.call(t, None, text)[1] for t in (3.0, 2.0) for text in (0.0, 1.0)]
    assert steps == [2, 2, 3, 3]


def test_steps_that_are_stated() -> None:
    loop = Loop()
    assert [loop.call(9.0, "cond", stated=step)[1] for step in (0, 1, 1, 2)] == [0, 1, 1, 2]
