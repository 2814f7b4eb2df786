"""Runs plans of a model, and compares them with full generations that it records."""

from __future__ import annotations

import warnings

import numpy as np

from pabc.calibration.candidates import Candidate
from pabc.calibration.checks import check_noise, check_skips, warn_of_chance
from pabc.calibration.costs import Costs
from pabc.calibration.measurement import Measurement, schedule_of
from pabc.calibration.notes import Notes, Reference
from pabc.calibration.progress import Progress
from pabc.calibration.recording import Recording
from pabc.calibration.results import decibels
from pabc.calibration.resumption import check_resumed
from pabc.calibration.subject import Run, Sample, Subject
from pabc.calibration.updates import identify

EXACT = 0.01
"""The residual up to which a sampler is known well enough to be told from another."""
NOISY = 0.25
"""The residual of one of the sampler's updates above which they are not known well."""


class SampledRuns:
    """Runs the generations of a user's function by plans, beside full ones."""

    def __init__(
        self,
        sample: Sample,
        subject: Subject,
        notes: Notes,
        progress: Progress,
        seeds: tuple[int, ...],
    ) -> None:
        self._sample, self._subject, self._notes, self._progress = sample, subject, notes, progress
        self.seeds = seeds
        self._has_warned = False

    @property
    def measured(self) -> tuple[Measurement, ...]:
        """The plans that were run so far."""
        return tuple(self._notes.measured.values())

    @property
    def costs(self) -> Costs:
        """The seconds of full and skipped calls, as far as they were measured."""
        return self._notes.costs

    @property
    def has_costs(self) -> bool:
        """True if a skipped call was measured."""
        return bool(self._notes.skipped)

    def expect(self, runs: int) -> None:
        """Shows how many more runs are to come, or, below 0, are not."""
        self._progress.expect(runs)

    def record(self) -> Recording:
        """Records the seeds that are not recorded yet; returns the sum of all.

        If some are, from an earlier run, their first steps are compared: see `check_resumed`.
        """
        known = self._notes.references
        if known:
            seed = next((seed for seed in self.seeds if seed in known), min(known))
            check_resumed(self._subject, self._sample, seed, known[seed], self._notes.path)
        missing = [seed for seed in self.seeds if seed not in self._notes.references]
        self._progress.expect(len(missing))
        for seed in missing:
            self._progress.begin(f"recording seed {seed}")
            run = self._subject.record(self._sample, seed)
            assert run.recording is not None
            watch = run.watch
            reference = Reference(run.recording, run.result, watch.opening, watch.precision)
            self._notes.full += run.watch.full if not self._notes.skipped else []
            self._notes.add_reference(seed, reference)
            self._progress.finish(f"recorded seed {seed}")
        self._check_samplers()
        recording = self._notes.recording(self.seeds)
        self._subject.timesteps = recording.timesteps
        updates = identify(recording)
        if float(updates.residual.max()) > NOISY:
            _warn_of_noise(updates.residual)
        self._peak, self._timesteps = recording.peak, recording.timesteps
        return recording

    def _check_samplers(self) -> None:
        """Raises ValueError where seeds were recorded with different samplers, or guidance scales,
        as an older file for `resume` may hold."""
        first, *others = (self._notes.references[seed].recording for seed in self.seeds)
        mine = identify(first)
        for seed, other in zip(self.seeds[1:], others, strict=True):
            if (other.timesteps, other.branches) != (first.timesteps, first.branches):
                continue  # which the sum of them refuses
            theirs = identify(other)
            is_exact = max(mine.residual[:3].max(), theirs.residual[:3].max()) < EXACT
            if is_exact and not np.allclose(mine.outputs[:3], theirs.outputs[:3], 0.05, 1e-6):
                raise ValueError(
                    f"sample: expected one sampler and guidance scale, found that seeds "
                    f"{self.seeds[0]} and {seed} were recorded with different ones; use another "
                    "file for resume"
                )

    def measure(self, candidate: Candidate, seed: int) -> Measurement:
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
        step = check_noise(run, self._notes.references[seed].opening, seed)
        if step is not None and not self._has_warned:
            self._has_warned = True
            warn_of_chance(seed, step)
        check_skips(
            run, set(range(len(candidate.weights))) - set(candidate.computed), self._subject
        )


def _warn_of_noise(residual: np.ndarray) -> None:
    step = int(residual.argmax())
    warnings.warn(
        f"pabc: up to {residual[step]:.0%} of what the sampler does (at step {step}) does not "
        "follow from the model's outputs: it adds noise, clips, or rescales its guidance. "
        "Predictions are less exact for that; what is measured holds as ever",
        stacklevel=4,
    )
