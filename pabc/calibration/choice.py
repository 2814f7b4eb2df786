"""Chooses plans for a target: runs candidates, and takes the best."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Protocol

from pabc.calibration.candidates import Candidate
from pabc.calibration.costs import Costs
from pabc.calibration.frontier import Corrections, best_of
from pabc.calibration.measurement import Measurement, full_plan
from pabc.calibration.recording import Recording
from pabc.calibration.search import search
from pabc.calibration.target import Target
from pabc.calibration.updates import identify


class Runs(Protocol):
    """Runs plans, and remembers what came of them."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """The generations that were recorded, and can be run by plans."""

    @property
    def measured(self) -> Sequence[Measurement]:
        """The plans that were run so far."""

    @property
    def costs(self) -> Costs:
        """The seconds of full and skipped calls, as far as they were measured."""

    @property
    def has_costs(self) -> bool:
        """True if a skipped call was measured."""

    def measure(self, candidate: Candidate, seed: int) -> Measurement:
        """Runs a plan for a seed, unless it was; returns what is known of it."""

    def expect(self, runs: int) -> None:
        """Is told how many more runs are to come, or, below 0, are not."""


class Choice:
    """Chooses plans by what they really give."""

    def __init__(self, recording: Recording, runs: Runs, *, limit: int, floor: float) -> None:
        """
        Args:
            recording: of all seeds.
            runs: what runs plans.
            limit: the most candidates that are run for one number of computed steps.
            floor: the PSNR in dB that a plan for a speedup or a number of calls must have.
        """
        self._runs, self._limit, self._floor = runs, limit, floor
        self._peak = recording.peak
        self._search = search(recording, identify(recording))

    def meet(self, target: Target) -> Candidate:
        """Runs candidates for a target, and returns the plan that is taken.

        Warns where none has the fidelity that is asked for, or the floor.
        """
        if target.measure == "psnr":
            found = self._find_fastest(target.value)
            if len(found.computed) == self._search.num_steps:
                warnings.warn(
                    f"pabc: {target}: found no plan with that PSNR but the full generation",
                    stacklevel=4,
                )
            return found
        computed = self._most_computed(target)
        best = self._try(computed) if computed >= self._search.min_computed else None
        if best is not None and best.mean >= self._floor:
            return best.candidate
        above = self._find_fastest(self._floor, above=computed)
        known = "no plan that fast" if best is None else f"{best.mean:.1f} dB at best"
        n = self._search.num_steps
        warnings.warn(
            f"pabc: {target}: expected {self._floor:g} dB or more, found {known}; the plan taken "
            f"is the fastest one that has {self._floor:g} dB: it computes {len(above.computed)} of "
            f"{n} steps",
            stacklevel=4,
        )
        return above

    def _most_computed(self, target: Target) -> int:
        """Returns how many steps may be computed; measures the seconds of a skipped call first."""
        n = self._search.num_steps
        if target.measure == "calls":
            return min(int(target.value), n)
        computed = self._runs.costs.most_computed(n, target.value)
        if not self._runs.has_costs and self._search.min_computed <= computed < n:
            self._runs.expect(1)
            self._runs.measure(self._search.best(computed), self._runs.seeds[0])
            computed = self._runs.costs.most_computed(n, target.value)
        return computed

    def _try(self, computed: int, enough: float = math.inf) -> Measurement | None:
        """Runs candidates with a number of computed steps; returns the best.

        Of those that were run with a seed, the better half is run with the next. The first that
        has `enough` dB is run alone.
        """
        seeds = self._runs.seeds
        if computed == self._search.num_steps:
            return Measurement(full_plan(computed), math.inf, dict.fromkeys(seeds, math.inf))
        left = self._search.candidates(computed, limit=self._limit)
        found: list[Measurement] = []
        for seed in seeds:
            self._runs.expect(len(left))
            found = []
            for candidate in left:
                found.append(self._runs.measure(candidate, seed))
                if found[-1].mean >= enough:
                    self._runs.expect(len(found) - len(left))
                    found = found[-1:]
                    break
            found.sort(key=lambda each: -each.merit)
            left = [each.candidate for each in found[: (len(found) + 1) // 2]]
        return best_of(found)

    def _find_fastest(self, psnr: float, above: int = 0) -> Candidate:
        """Returns the plan of the fewest computed steps, more than `above`, that is measured to
        have this PSNR: by bisection, at steps that the corrected predictions propose."""
        low, high = max(above, self._search.min_computed - 1), self._search.num_steps
        best = full_plan(high)
        for turn in range(high):
            if high - low <= 1:
                break
            middle = (low + high) // 2
            guess = middle if turn % 4 == 3 else self._guess(psnr, low, high)
            found = self._try(guess, enough=psnr)
            if found is not None and found.mean >= psnr:
                high, best = guess, found.candidate
            else:
                low = guess
        return best

    def _guess(self, psnr: float, low: int, high: int) -> int:
        """Returns the number of computed steps between these that is predicted to suffice first."""
        corrections = Corrections(tuple(self._runs.measured))
        while high - low > 2:
            middle = (low + high) // 2
            if self._predict(middle, corrections) >= psnr:
                high = middle
            else:
                low = middle
        return low + 1

    def _predict(self, computed: int, corrections: Corrections) -> float:
        """Returns the highest corrected PSNR of the candidates with a number of computed steps, or
        that of the first, the most often best, while no such plan was measured."""
        candidates = self._search.candidates(computed, limit=self._limit)
        known = [each for each in candidates if corrections.knows(each)]
        return max(
            corrections.correct(each, each.decibels(self._peak)) for each in known or candidates[:1]
        )
