"""Paths: the cheapest computed steps, for every number of them, by dynamic programming.

A state is a computed step s with the gaps to the one or two computed steps before it, which are the
sources of forecasts. The cost of a transition from s to t, the next computed step, is that of the
skipped steps between. Where another model takes over, the history begins anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MANY = 64
"""With more steps, not all of the longer gaps are tried."""


@dataclass(frozen=True)
class Grid:
    """The gaps that are tried between computed steps, and the states that they make.

    Attributes:
        num_steps: n.
        starts: steps at which a model takes over, the first of them 0.
        gaps: in increasing order, the first of them 1.
        sources: of a forecast, at most; 1, 2 or 3.
    """

    num_steps: int
    starts: tuple[int, ...]
    gaps: tuple[int, ...]
    sources: int

    @property
    def shape(self) -> tuple[int, int]:
        """The number of gaps before a computed step, and before the one before it.

        Index 0 stands for no such step, index k for a gap of `gaps[k - 1]`.
        """
        size = len(self.gaps) + 1
        return (size if self.sources > 1 else 1), (size if self.sources > 2 else 1)

    def first(self, step: int) -> int:
        """Returns the step at which the model of this step took over."""
        return max(start for start in self.starts if start <= step)

    def end(self, step: int) -> int:
        """Returns the next step that is computed for certain: of another model, or the last."""
        return min((start for start in self.starts if start > step), default=self.num_steps - 1)

    def find_sources(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the states at a computed step: which there are, [*shape], and their sources.

        Sources are steps, the newest first, [*shape, sources]; -1 for none.
        """
        first, gaps = self.first(step), np.array([0, *self.gaps])
        a, b = np.meshgrid(*map(np.arange, self.shape), indexing="ij")
        second = np.where(a > 0, step - gaps[a], -1)
        third = np.where((a > 0) & (b > 0), second - gaps[b], -1)
        possible = np.ones(self.shape, dtype=bool)
        if self.sources > 1:
            possible = np.where(a > 0, second >= first, (step == first) & (b == 0))
        if self.sources > 2:
            possible &= np.where(b > 0, third >= first, (a == 0) | (second == first))
        sources = np.stack([np.full(self.shape, step), second, third], -1)[..., : self.sources]
        return possible, np.where(possible[..., None], np.maximum(sources, -1), -1)


def choose_gaps(num_steps: int, longest: int) -> tuple[int, ...]:
    """Returns the gaps that are tried: all, or, with many steps, fewer of the longer ones."""
    longest = max(1, min(longest, num_steps - 1))
    if num_steps <= MANY:
        return tuple(range(1, longest + 1))
    gaps = [1]
    while gaps[-1] < longest:
        gaps.append(min(longest, gaps[-1] + max(1, gaps[-1] // 5)))
    return tuple(gaps)


@dataclass(frozen=True)
class Paths:
    """The cheapest paths.

    Attributes:
        grid: of the states.
        costs: [n + 1] of the cheapest path with this many computed steps; inf where there is none.
        ends: [n + 1] the state in which it ends.
        before: [n, *shape, n + 1] where the cheapest path to a state came from: index of the gap,
            and of the state, as one number.
    """

    grid: Grid
    costs: np.ndarray
    ends: np.ndarray
    before: np.ndarray

    def trace(self, computed: int) -> tuple[int, ...] | None:
        """Returns the cheapest steps of this number, in order; None if there are none."""
        if not np.isfinite(self.costs[computed]):
            return None
        step, state, path = self.grid.num_steps - 1, int(self.ends[computed]), []
        for left in range(computed, 0, -1):
            path.append(step)
            if left > 1:
                code = int(self.before[step].reshape(-1, self.before.shape[-1])[state, left])
                gap, state = divmod(code, int(np.prod(self.grid.shape)))
                step -= self.grid.gaps[gap]
        return tuple(reversed(path))


def find_paths(grid: Grid, amplitudes: np.ndarray, scale: np.ndarray) -> Paths:
    """Returns the cheapest paths from the first step to the last.

    Args:
        grid: of the states.
        amplitudes: [n, *shape, j] of the error of a forecast j + 1 steps after a computed one.
        scale: [n] of what an error at a step costs.
    """
    n, shape, size = grid.num_steps, grid.shape, int(np.prod(grid.shape))
    values = np.full((n, *shape, n + 1), np.inf)
    before = np.zeros((n, *shape, n + 1), dtype=np.int32)
    values[0, 0, 0, 1] = 0.0
    for step in range(n - 1):
        end, counts = grid.end(step), slice(1, step + 2)
        here = values[step, ..., counts]
        if not np.isfinite(here).any():
            continue
        width = min(amplitudes.shape[-1], end - step - 1)
        inner = amplitudes[step, ..., :width] * scale[step + 1 : step + 1 + width]
        costs = np.concatenate([np.zeros((*shape, 1)), np.cumsum(inner, -1)], -1)
        for index, gap in enumerate(grid.gaps):
            if step + gap > end:
                break
            reached = here + costs[..., gap - 1, None]
            is_start = step + gap in grid.starts
            _keep_best(values[step + gap], before[step + gap], reached, index, is_start, counts)
    last = values[n - 1].reshape(size, n + 1)
    return Paths(grid, last.min(0), last.argmin(0), before)


def _keep_best(
    values: np.ndarray,
    before: np.ndarray,
    reached: np.ndarray,
    index: int,
    is_start: bool,
    counts: slice,
) -> None:
    """Enters what is reached over one gap into the states of the step that it leads to."""
    a, b, width = reached.shape
    base = index * a * b
    after = slice(counts.start + 1, counts.stop + 1)
    if is_start or a == 1:
        flat = reached.reshape(a * b, width)
        best, code = flat.min(0), flat.argmin(0)
        target, source = values[0, 0, after], before[0, 0, after]
    elif b == 1:
        flat = reached[:, 0]
        best, code = flat.min(0), flat.argmin(0)
        target, source = values[index + 1, 0, after], before[index + 1, 0, after]
    else:
        best = reached.min(1)
        code = reached.argmin(1) + np.arange(a)[:, None] * b
        target, source = values[index + 1, :, after], before[index + 1, :, after]
    better = best < target
    target[better] = best[better]
    source[better] = (base + code)[better]


def find_skipped(computed: Sequence[int], num_steps: int) -> list[int]:
    """Returns the steps that are not computed, in order."""
    return sorted(set(range(num_steps)) - set(computed))


def find_history(
    computed: Sequence[int], starts: Sequence[int], step: int, sources: int
) -> tuple[int, ...]:
    """Returns the last computed steps before a step, of the same model, the newest first."""
    first = max(start for start in starts if start <= step)
    known = [each for each in computed if first <= each < step]
    return tuple(itertools.islice(reversed(known), sources))
