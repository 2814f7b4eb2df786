"""Search: the best steps to compute, for every number of them at once, by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pabc.calibration.candidates import KINDS, LEAST, Candidate, Kind, Rows
from pabc.calibration.compensation import Outputs, compensate, predict
from pabc.calibration.fit import fit_weights
from pabc.calibration.growth import amplify_early, expect_growth
from pabc.calibration.paths import Grid, Paths, choose_gaps, find_history, find_paths, find_skipped
from pabc.calibration.recording import Recording
from pabc.calibration.refinement import refine
from pabc.calibration.updates import CLEAR, Updates, check_finite

MAX_GAPS = {1: 1000, 2: 40, 3: 16}
"""Sources -> the longest gap between computed steps, where none is given."""


class _Found:
    """The best paths of one kind, and what the weights of a plan follow from."""

    def __init__(
        self,
        kind: Kind,
        paths: Paths,
        *,
        gram: np.ndarray,
        outputs: Outputs,
        effects: np.ndarray,
        max_gap: int | None,
    ) -> None:
        self.kind, self.paths = kind, paths
        self._gram, self._outputs, self._effects = gram, outputs, effects
        self._max_gap = max_gap
        self._plans: dict[int, Candidate | None] = {}

    def plan(self, computed: int) -> Candidate | None:
        """Returns the best plan with this number of computed steps, None if there is none."""
        if computed not in self._plans:
            self._plans[computed] = self._find(computed)
        return self._plans[computed]

    def _find(self, computed: int) -> Candidate | None:
        path, starts = self.paths.trace(computed), self.paths.grid.starts
        if path is None:
            return None
        if self.kind.compensation:
            how: dict[str, Any] = {
                "sources": self.kind.sources,
                "starts": starts,
                "compensation": self.kind.compensation,
            }
            path = refine(self._outputs, path, self._effects, max_gap=self._max_gap, **how)
            found, _ = compensate(self._outputs, _mask(path, self._outputs), self._effects, **how)
            weights = _as_rows(found[0], path, starts)
        else:
            weights = find_weights(self._gram, path, self.kind, starts)
        return Candidate(self.kind.name, path, weights, self._predict(path, weights))

    def _predict(self, path: tuple[int, ...], weights: Rows) -> float:
        rows = np.zeros((1, len(weights), max(1, *map(len, weights))))
        for step, row in enumerate(weights):
            rows[0, step, : len(row)] = row
        starts = self.paths.grid.starts
        mask = _mask(path, self._outputs)
        norms = predict(self._outputs, mask, rows, self._effects, starts=starts)
        return max(LEAST, float(norms[0]))


def _mask(path: Sequence[int], outputs: Outputs) -> np.ndarray:
    mask = np.zeros((1, outputs.num_steps), dtype=bool)
    mask[0, list(path)] = True
    return mask


def _as_rows(weights: np.ndarray, path: Sequence[int], starts: Sequence[int]) -> Rows:
    """Returns the weights [n, k] of those sources that there are; () at computed steps."""
    sizes = [
        0 if step in path else len(find_history(path, starts, step, weights.shape[1]))
        for step in range(len(weights))
    ]
    return tuple(tuple(map(float, row[:size])) for row, size in zip(weights, sizes, strict=True))


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
        growth: [n] of an error made at a step, the share that is left at the end, for kinds whose
            errors decay; None: as `expect_growth` tells.
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
    if not kinds:
        raise ValueError("kinds: expected at least one, found none")
    growths = {
        "none": np.ones(n),
        "early": amplify_early(n),
        "decay": expect_growth(recording) if growth is None else np.abs(growth),
    }
    starts = tuple(sorted({0, *recording.starts}))
    root = np.sqrt(max(1, recording.elements * recording.count))
    outputs = Outputs.from_recording(recording, updates.shares())
    outputs = replace(outputs, gram=outputs.gram / root**2)
    grams = {is_guided: _combine(recording, updates, is_guided) for is_guided in (True, False)}
    amplitudes: dict[tuple[object, ...], np.ndarray] = {}
    paths: dict[tuple[object, ...], Paths] = {}
    found = []
    for kind in kinds:
        sources = min(kind.sources, len(MAX_GAPS))
        grid = Grid(n, starts, choose_gaps(n, max_gap or MAX_GAPS[sources]), sources)
        key = (sources, kind.is_fitted, kind.is_guided)
        if key not in amplitudes:
            amplitudes[key] = find_amplitudes(grams[kind.is_guided], grid, kind)
        costs = (*key, kind.cost, kind.growth, kind.power)
        if costs not in paths:
            scale = weigh_steps(updates, kind, growths[kind.growth])
            paths[costs] = find_paths(grid, amplitudes[key], scale)
        found.append(
            _Found(
                kind,
                paths[costs],
                gram=grams[kind.is_guided],
                outputs=outputs,
                effects=find_effects(updates, growths[kind.growth]),
                max_gap=max_gap,
            )
        )
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
            _, errors = fit_weights(gram, steps, used, is_fitted=kind.is_fitted)
            found[step][possible, : len(targets)] = np.sqrt(errors)
    return found


def find_weights(
    gram: np.ndarray, computed: Sequence[int], kind: Kind, starts: Sequence[int]
) -> Rows:
    """Returns the weights of a plan per step, the newest source first; () at computed steps."""
    n = gram.shape[-1]
    rows: list[tuple[float, ...]] = [()] * n
    for step in find_skipped(computed, n):
        sources = find_history(computed, starts, step, kind.sources)
        weights, _ = fit_weights(gram, np.array(step), np.array(sources), is_fitted=kind.is_fitted)
        rows[step] = tuple(map(float, weights))
    return tuple(rows)


def weigh_steps(updates: Updates, kind: Kind, growth: np.ndarray) -> np.ndarray:
    """Returns what an error of the guided output at each step costs in the search, [n].

    Where the sampler is not known, all cost the same. A decay counts as its square: of 40 choices
    on the emoji, on noise that was not recorded, the plans were 1.5 dB better in the mean.
    """
    scale = np.ones(updates.num_steps)
    if kind.cost != "flat" and is_known(updates):
        scale = np.abs(updates.direct if kind.cost == "direct" else updates.propagated())
    return scale * (growth**kind.power if kind.growth == "decay" else growth)


def find_effects(updates: Updates, growth: np.ndarray) -> np.ndarray:
    """Returns the effects of guided outputs on the final result, [n], for `compensate`."""
    if is_known(updates):
        return updates.effects(growth)
    return np.abs(updates.direct).mean() * growth


def is_known(updates: Updates) -> bool:
    """Returns True if most transitions are explained by their coefficients."""
    return bool(np.median(updates.residual) < CLEAR)
