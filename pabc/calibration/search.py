"""Search: the best steps to compute, for every number of them at once, by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pabc.calibration.candidates import KINDS, LEAST, Candidate, Kind
from pabc.calibration.fit import fit_weights
from pabc.calibration.paths import Grid, Paths, choose_gaps, find_history, find_paths, find_skipped
from pabc.calibration.recording import Recording
from pabc.calibration.updates import CLEAR, Updates, check_finite

MAX_GAPS = {1: 1000, 2: 40, 3: 16}
"""Sources -> the longest gap between computed steps, where none is given."""


@dataclass(frozen=True)
class _Found:
    """The best paths of one kind, and what the weights of a plan follow from."""

    kind: Kind
    gram: np.ndarray
    paths: Paths

    def plan(self, computed: int) -> Candidate | None:
        """Returns the best plan with this number of computed steps, None if there is none."""
        path = self.paths.trace(computed)
        if path is None:
            return None
        weights = find_weights(self.gram, path, self.kind, self.paths.grid.starts)
        error = max(LEAST, float(self.paths.costs[computed]))
        return Candidate(self.kind.name, path, weights, error)


@dataclass(frozen=True)
class Search:
    """All candidates for every number of computed steps.

    Attributes:
        num_steps: n, of the generation.
        min_computed: the fewest steps that a plan computes: the first and the last, and those at
            which another model takes over.
    """

    num_steps: int
    min_computed: int
    _found: tuple[_Found, ...] = field(repr=False)

    def candidates(self, computed: int, *, limit: int = 8) -> list[Candidate]:
        """Returns different plans with this number of computed steps, the best of each kind.

        They come in the order of kinds, those that are most often best first: errors predicted for
        plans of different kinds do not compare.

        Raises ValueError for a number of steps that no plan computes.
        """
        low, n = self.min_computed, self.num_steps
        if isinstance(computed, bool) or not isinstance(computed, (int, np.integer)):
            raise ValueError(f"computed: expected a number of steps, found {computed!r}")
        if not low <= computed <= n:
            raise ValueError(f"computed: expected {low} to {n} steps, found {computed}")
        if limit < 1:
            raise ValueError(f"limit: expected a positive number, found {limit}")
        different: dict[tuple[object, ...], Candidate] = {}
        for found in self._found:
            if len(different) < limit and (plan := found.plan(computed)) is not None:
                key = (plan.computed, tuple(tuple(np.round(row, 4)) for row in plan.weights))
                different.setdefault(key, plan)
        return list(different.values())

    def best(self, computed: int) -> Candidate:
        """Returns the candidate that is most often best with this number of computed steps."""
        return self.candidates(computed, limit=1)[0]


def search(
    recording: Recording,
    updates: Updates,
    *,
    growth: np.ndarray | None = None,
    max_gap: int | None = None,
    kinds: Sequence[Kind] = KINDS,
) -> Search:
    """Returns the best plans of several kinds, for every number of computed steps.

    Args:
        recording: of one generation, or the sum of several.
        updates: of its sampler.
        growth: [n] of an error made at a step, the share that is left at the end; None: unknown,
            and kinds that need it are left out.
        max_gap: the longest gap between computed steps: a gap of 2 skips one step. None: 16 with
            three sources, 40 with two, no limit with one.
        kinds: of plans, those that are most often best first.

    Raises ValueError on bad values.
    """
    check_finite(recording)
    n = recording.num_steps
    if updates.num_steps != n:
        raise ValueError(f"updates: expected those of {n} steps, found {updates.num_steps}")
    if growth is not None and (np.shape(growth) != (n,) or not np.isfinite(growth).all()):
        raise ValueError(f"growth: expected {n} finite numbers, found {growth!r}")
    if max_gap is not None and max_gap < 1:
        raise ValueError(f"max_gap: expected a positive number, found {max_gap}")
    kinds = [kind for kind in kinds if growth is not None or not kind.has_growth]
    if not kinds:
        raise ValueError("kinds: expected a kind of plan that needs no growth, found none")
    starts = tuple(sorted({0, *recording.starts}))
    grams = {is_guided: _combine(recording, updates, is_guided) for is_guided in (True, False)}
    amplitudes: dict[tuple[object, ...], np.ndarray] = {}
    found = []
    for kind in kinds:
        gaps = choose_gaps(n, max_gap or MAX_GAPS[kind.sources])
        grid = Grid(n, starts, gaps, kind.sources)
        key = (kind.sources, kind.is_fitted, kind.is_guided, kind.noise)
        if key not in amplitudes:
            amplitudes[key] = find_amplitudes(grams[kind.is_guided], grid, kind)
        scale = weigh_steps(updates, kind, growth)
        scale = scale / np.sqrt(max(1, recording.elements * recording.count))
        paths = find_paths(grid, amplitudes[key], scale)
        found.append(_Found(kind, grams[kind.is_guided], paths))
    return Search(n, len({*starts, n - 1}), tuple(found))


def _combine(recording: Recording, updates: Updates, is_guided: bool) -> np.ndarray:
    """Returns the inner products of which errors are taken, [n, n, n]: see `Kind.is_guided`."""
    if is_guided:
        return updates.guided(recording)
    n, m = recording.num_steps, len(recording.branches)
    gram = sum(recording.outputs(b, b) for b in range(m)) / m
    return np.broadcast_to(gram, (n, n, n))


def find_amplitudes(gram: np.ndarray, grid: Grid, kind: Kind) -> np.ndarray:
    """Returns the norms of the errors of all forecasts, [n, *shape, j].

    The last axis counts the steps after the newest source, less 1. Where there is no such state or
    step, it is 0.
    """
    n, width = grid.num_steps, max(0, grid.gaps[-1] - 1)
    found = np.zeros((n, *grid.shape, width))
    for step in range(n - 1):
        possible, sources = grid.find_sources(step)
        targets = np.arange(step + 1, min(step + 1 + width, grid.end(step)))
        if len(targets) and possible.any():
            used = np.repeat(sources[possible][:, None], len(targets), 1)
            steps = np.broadcast_to(targets, used.shape[:-1])
            _, errors = fit_weights(gram, steps, used, is_fitted=kind.is_fitted, noise=kind.noise)
            found[step][possible, : len(targets)] = np.sqrt(errors)
    return found


def find_weights(
    gram: np.ndarray, computed: Sequence[int], kind: Kind, starts: Sequence[int]
) -> tuple[tuple[float, ...], ...]:
    """Returns the weights of a plan per step, the newest source first; () at computed steps."""
    n = gram.shape[-1]
    rows: list[tuple[float, ...]] = [()] * n
    for step in find_skipped(computed, n):
        sources = find_history(computed, starts, step, kind.sources)
        weights, _ = fit_weights(
            gram, np.array(step), np.array(sources), is_fitted=kind.is_fitted, noise=kind.noise
        )
        rows[step] = tuple(map(float, weights))
    return tuple(rows)


def weigh_steps(updates: Updates, kind: Kind, growth: np.ndarray | None) -> np.ndarray:
    """Returns what an error of the guided output at each step costs, [n].

    Where the sampler is not known, all cost the same.
    """
    is_known = bool(np.median(updates.residual) < CLEAR)
    flat = np.full(updates.num_steps, np.abs(updates.direct).mean())
    scale = flat
    if kind.cost != "flat" and is_known:
        scale = np.abs(updates.direct if kind.cost == "direct" else updates.propagated())
    return scale if growth is None or not kind.has_growth else scale * np.abs(growth)
