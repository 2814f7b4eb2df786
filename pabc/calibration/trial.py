"""Runs plans of one model beside its full generations, and takes the best."""

from __future__ import annotations

import math
import warnings

import numpy as np

from pabc.calibration.candidates import Candidate
from pabc.calibration.frontier import Corrections, best_of
from pabc.calibration.measurement import Measurement, full_plan, schedule_of
from pabc.calibration.notes import Notes, Reference
from pabc.calibration.progress import Progress
from pabc.calibration.results import decibels
from pabc.calibration.search import search
from pabc.calibration.subject import Run, Sample, Subject
from pabc.calibration.target import Target
from pabc.calibration.updates import identify
from pabc.calibration.watch import differ

NOISY = 0.25
"""The residual of one of the sampler's updates above which they are not known well."""


class Trial:
    """Runs plans of one model beside its full generations."""

    def __init__(
        self,
        sample: Sample,
        subject: Subject,
        notes: Notes,
        progress: Progress,
        seeds: tuple[int, ...],
        limit: int,
        floor: float,
    ) -> None:
        self._sample, self._subject, self._notes, self._progress = sample, subject, notes, progress
        self._seeds, self._limit, self._floor = seeds, limit, floor
        self._has_warned = False

    def record(self) -> None:
        """Records the seeds that are not recorded yet, and searches for plans."""
        missing = [seed for seed in self._seeds if seed not in self._notes.references]
        self._progress.expect(len(missing))
        for seed in missing:
            self._progress.begin(f"recording seed {seed}")
            run = self._subject.record(self._sample, seed)
            assert run.recording is not None
            reference = Reference(run.recording, run.result, run.watch.opening)
            self._notes.full += run.watch.full if not self._notes.skipped else []
            self._notes.add_reference(seed, reference)
            self._progress.finish(f"recorded seed {seed}")
        recording = self._notes.recording(self._seeds)
        self._subject.timesteps = recording.timesteps
        updates = identify(recording)
        if float(updates.residual.max()) > NOISY:
            _warn_of_noise(updates.residual)
        self._peak, self._timesteps = recording.peak, recording.timesteps
        self._search = search(recording, updates)

    def meet(self, target: Target) -> Candidate:
        """Runs candidates for a target, and returns the plan that is taken."""
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
        reason = "no plan" if best is None else f"{best.mean:.1f} dB at best"
        n = self._search.num_steps
        warnings.warn(
            f"pabc: {target}: expected {self._floor:g} dB or more, found {reason}; taken is the "
            f"fastest plan above that, which computes {len(above.computed)} of {n} steps",
            stacklevel=4,
        )
        return above

    def _most_computed(self, target: Target) -> int:
        """Returns how many steps may be computed; measures the seconds of a skipped call first."""
        n = self._search.num_steps
        if target.measure == "calls":
            return min(int(target.value), n)
        computed = self._notes.costs.most_computed(n, target.value)
        if not self._notes.skipped and self._search.min_computed <= computed < n:
            self._progress.expect(1)
            self._measure(self._search.best(computed), self._seeds[0])
            computed = self._notes.costs.most_computed(n, target.value)
        return computed

    def _try(self, computed: int, enough: float = math.inf) -> Measurement | None:
        """Runs candidates with a number of computed steps; returns the best.

        Of those that were run with a seed, the better half is run with the next. The first that
        has `enough` dB is run alone.
        """
        if computed == self._search.num_steps:
            full = full_plan(computed)
            return Measurement(full, math.inf, dict.fromkeys(self._seeds, math.inf))
        left = self._search.candidates(computed, limit=self._limit)
        found: list[Measurement] = []
        for seed in self._seeds:
            self._progress.expect(len(left))
            found = []
            for candidate in left:
                found.append(self._measure(candidate, seed))
                if found[-1].mean >= enough:
                    self._progress.drop(len(left) - len(found))
                    found = found[-1:]
                    break
            found.sort(key=lambda each: -each.mean)
            left = [each.candidate for each in found[: (len(found) + 1) // 2]]
        return best_of(found)

    def _measure(self, candidate: Candidate, seed: int) -> Measurement:
        """Runs a candidate with a seed, unless it was; returns what is known of it."""
        notes = self._notes
        known = notes.measured.get((candidate.computed, candidate.weights))
        if known is not None and seed in known.decibels:
            self._progress.drop(1)
            return known
        count = len(candidate.computed)
        self._progress.begin(f"{count} steps, {candidate.name}, seed {seed}")
        run = self._subject.run(self._sample, seed, schedule_of(candidate, self._timesteps))
        self._check(run, candidate, seed)
        if not notes.skipped:
            notes.full.clear()  # those of the recording, which took longer
        notes.full += run.watch.full
        notes.skipped += run.watch.skipped
        found = decibels(notes.references[seed].result, run.result)
        notes.add_measured(candidate, candidate.decibels(self._peak), seed, found)
        self._progress.finish(f"{count} steps, {candidate.name}: {found:.1f} dB")
        return notes.measured[candidate.computed, candidate.weights]

    def _check(self, run: Run, candidate: Candidate, seed: int) -> None:
        """Raises ValueError, or warns, where a run is not the recorded one but for the plan."""
        opening = self._notes.references[seed].opening
        for step, inputs in opening.items():
            if step in run.watch.opening and differ(inputs, run.watch.opening[step]):
                if step == 0:
                    raise ValueError(
                        f"sample: expected the same inputs at step 0 whenever the seed is {seed}, "
                        "found others: draw the noise from a generator with that seed"
                    )
                self._warn_of_chance(seed, step)
        skipped = set(range(self._search.num_steps)) - set(candidate.computed)
        lacking = [step for step in sorted(skipped) if not run.watch.num_skipped[step]]
        if lacking:
            raise ValueError(
                f"sample: expected the calls of {len(skipped)} steps to be skipped, found that "
                f"those of {len(lacking)} were computed, step {lacking[0]} first; reasons: "
                f"{self._subject.fallbacks() or 'none'}"
            )

    def _warn_of_chance(self, seed: int, step: int) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"pabc: two generations with seed {seed} differ at step {step}, before anything "
                "was skipped: the scheduler or the model draws random numbers that the seed does "
                "not fix. What is measured is that difference too; pass a generator, or take a "
                "scheduler without noise",
                stacklevel=6,
            )

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
        corrections = Corrections(tuple(self._notes.measured.values()))
        for computed in range(low + 1, high):
            candidates = self._search.candidates(computed, limit=self._limit)
            known = [each for each in candidates if corrections.knows(each)]
            predicted = [
                corrections.correct(each, each.decibels(self._peak)) for each in known or candidates
            ]
            if max(predicted) >= psnr:
                return computed
        return high - 1


def _warn_of_noise(residual: np.ndarray) -> None:
    step = int(residual.argmax())
    warnings.warn(
        f"pabc: up to {residual[step]:.0%} of what the sampler does (at step {step}) does not "
        "follow from the model's outputs: it adds noise, clips, or rescales its guidance. "
        "Predictions are less exact for that; what is measured holds as ever",
        stacklevel=4,
    )
