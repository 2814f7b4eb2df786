"""Tells from the noise level of a call which step of a sampler's list of sigmas it belongs to."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from itertools import pairwise

NEAR = 0.01
"""The share of a step within which a sigma counts as the next one of the list: samplers that work
in other units give back sigmas that are rounded."""


class Sigmas:
    """The noise levels between which a sampler moves, in the order in which it does.

    Attributes:
        steps: the level at which each step begins; the last level of the list begins none.
    """

    def __init__(self, sigmas: Iterable[float]) -> None:
        """Raises ValueError for a list that does not fall, or rise, at each step."""
        levels = tuple(map(float, sigmas))
        falls = all(a > b for a, b in pairwise(levels))
        if len(levels) < 2 or not (falls or all(a < b for a, b in pairwise(levels))):
            raise ValueError(
                f"sigmas: expected two or more that fall, or rise, at each step, found {levels}"
            )
        self.steps = levels[:-1]
        self._sign = -1.0 if falls else 1.0
        rising = [self._sign * level for level in levels]
        self._starts = [b - NEAR * (b - a) for a, b in pairwise(rising[:-1])]
        """Of each step but the first one: where it begins, on an axis on which levels rise."""

    def step_of(self, sigma: float) -> int:
        """Returns the step of a call at this level: the last one that begins there or before.

        So the second call of Heun's method, at the level that is next, belongs to the next step; a
        call at a level in between, to the step that it divides.
        """
        return bisect_right(self._starts, self._sign * sigma)
