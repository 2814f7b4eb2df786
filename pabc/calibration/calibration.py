"""The result of a calibration: a plan for each number of computed steps, kept in a file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pabc.base.format import format_table
from pabc.calibration import measurement
from pabc.calibration.candidates import Candidate
from pabc.calibration.costs import Costs
from pabc.calibration.files import Arrays, nest, read_arrays, unnest, write_arrays
from pabc.calibration.frontier import FrontierRow, best_within, find_frontier, winning_kinds
from pabc.calibration.measurement import Measurement, schedule_of
from pabc.calibration.plot import draw
from pabc.calibration.recording import Recording
from pabc.calibration.search import Search, search
from pabc.calibration.target import Target
from pabc.calibration.updates import Updates, identify
from pabc.calibration.verification import Verification, verify
from pabc.schedule import Schedule

KIND = "calibration"
"""The mark of its files."""
SHOWN = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
"""The speedups whose rows a printed table shows, beside those that were measured."""


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """Plans for every speed, from one recording. Made by :func:`pabc.calibrate`; printed, a table.

    It holds for the steps, the guidance scale and the scheduler with which it was recorded, and
    for any prompt and seed.

    Attributes:
        recording: the inner products of what was recorded.
        measured: the plans that were really run.
        seconds_full: seconds of a call of the model, on the device it was recorded on; see
            :class:`Costs`.
        seconds_skipped: seconds of a forecast in its place.
        plans: each target that was asked for, with the plan taken for it.
        floor: the PSNR in dB below which no plan is taken, unless asked for by `psnr`.
        seeds: those that were recorded.
    """

    recording: Recording
    measured: tuple[Measurement, ...]
    seconds_full: float
    seconds_skipped: float
    plans: tuple[tuple[Target, Candidate], ...]
    floor: float
    seeds: tuple[int, ...]

    @property
    def timesteps(self) -> tuple[float, ...]:
        """One per step."""
        return self.recording.timesteps

    @property
    def num_steps(self) -> int:
        """The number of steps of a generation."""
        return len(self.timesteps)

    @property
    def chosen(self) -> Candidate:
        """The plan for the first target."""
        return self.plans[0][1]

    @property
    def costs(self) -> Costs:
        """The seconds of full and skipped calls."""
        return Costs(self.seconds_full, self.seconds_skipped)

    @cached_property
    def updates(self) -> Updates:
        """The sampler's updates, as identified from the recording."""
        return identify(self.recording)

    @cached_property
    def search(self) -> Search:
        """The plans for every number of computed steps, of the kinds that were measured best."""
        return search(self.recording, self.updates, kinds=winning_kinds(self.measured))

    def schedule(
        self,
        *,
        speedup: float | None = None,
        psnr: float | None = None,
        calls: int | None = None,
    ) -> Schedule:
        """Returns the schedule of the best plan for one target; by default, the first asked for.

        Args:
            speedup: of all calls of a generation, at the measured seconds of full and skipped ones.
            psnr: the least PSNR to the full result, in dB: measured where a plan was run, else
                predicted.
            calls: how many steps may call the model.

        Warns where the best plan at that speed is below :attr:`floor`, and takes the fastest one
        that is not. Raises ValueError for more than one target.
        """
        plan = self.plan(speedup=speedup, psnr=psnr, calls=calls)
        return schedule_of(plan, self.timesteps)

    def plan(
        self,
        *,
        speedup: float | None = None,
        psnr: float | None = None,
        calls: int | None = None,
    ) -> Candidate:
        """Returns the computed steps and weights of `schedule`, with its arguments."""
        given = {"speedup": speedup, "psnr": psnr, "calls": calls}
        if all(value is None for value in given.values()):
            return self.chosen
        target = Target.of(**given)
        known = dict(self.plans).get(target)
        return self._choose(target).candidate if known is None else known

    def _choose(self, target: Target) -> FrontierRow:
        if target.measure == "psnr":
            return next(row for row in self._frontier if row.decibels >= target.value)
        limit = self._most_computed(target)
        numbers = {limit, *(each.num_computed for each in self.measured)}
        row = best_within(self._find_rows(numbers), limit)
        if row is not None and row.decibels >= self.floor:
            return row
        above = next(row for row in self._frontier if row.decibels >= self.floor)
        warnings.warn(_explain_floor(target, row, above, self.floor), stacklevel=4)
        return above

    def _most_computed(self, target: Target) -> int:
        if target.measure == "calls":
            return min(int(target.value), self.num_steps)
        return self.costs.most_computed(self.num_steps, target.value)

    def frontier(self) -> list[FrontierRow]:
        """Returns the best known plan for each number of computed steps, fewest first.

        A row that was not measured holds a prediction: of the plan's error as it follows from the
        recording, corrected by what the measured plans of the same kind showed. It is no promise:
        give its speedup to :func:`pabc.calibrate`, which runs it, or see :meth:`verify`. The
        search takes some seconds when this is first called.
        """
        return list(self._frontier)

    @cached_property
    def _frontier(self) -> list[FrontierRow]:
        return self._find_rows(None)

    def _find_rows(self, numbers: Iterable[int] | None) -> list[FrontierRow]:
        peak = self.recording.peak
        return find_frontier(self.search, self.measured, self.costs, peak, numbers)

    def verify(
        self,
        sample: Callable[[Any, int], Any],
        model: Any,
        seeds: Iterable[int],
        *,
        speedup: float | None = None,
        psnr: float | None = None,
        calls: int | None = None,
        components: Iterable[str] | None = None,
        progress: bool = True,
    ) -> Verification:
        """Runs a plan and the full model on other seeds; returns the PSNR of each.

        Args:
            sample, model, components, progress: those of :func:`pabc.calibrate`.
            seeds: best none of those that were recorded.
            speedup, psnr, calls: which plan, as in :meth:`schedule`.
        """
        schedule = self.schedule(speedup=speedup, psnr=psnr, calls=calls)
        return verify(
            sample,
            model,
            seeds,
            schedule,
            recorded=self.seeds,
            components=components,
            progress=progress,
        )

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Writes the frontier, and the steps that the plans taken compute, to a file of SVG."""
        target = Path(path)
        plans = [candidate for _, candidate in self.plans]
        target.write_text(draw(self.frontier(), plans, self.floor))
        return target

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the calibration to a file, for :meth:`load`; whole or not at all.

        It holds inner products and plans: no latents, no weights.
        """
        plans = [Measurement(candidate, 0.0) for _, candidate in self.plans]
        arrays = {
            "measures": np.asarray([target.measure for target, _ in self.plans]),
            "values": np.asarray([target.value for target, _ in self.plans]),
            "seconds": np.asarray([self.seconds_full, self.seconds_skipped]),
            "floor": np.asarray(self.floor),
            "seeds": np.asarray(self.seeds, dtype=np.int64),
            **nest("recording", self.recording.to_arrays()),
            **nest("measured", measurement.to_arrays(self.measured, self.num_steps)),
            **nest("plans", measurement.to_arrays(plans, self.num_steps)),
        }
        return write_arrays(path, KIND, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Returns the calibration in a file.

        Raises ValueError for a file of another kind, or a damaged one; FileNotFoundError.
        """
        return read_arrays(path, KIND, cls._from_arrays)

    @classmethod
    def _from_arrays(cls, arrays: Arrays) -> Calibration:
        plans = measurement.from_arrays(unnest("plans", arrays))
        pairs = zip(arrays["measures"].tolist(), arrays["values"].tolist(), strict=True)
        targets = [Target(measure, value) for measure, value in pairs]
        seconds_full, seconds_skipped = arrays["seconds"].tolist()
        return cls(
            Recording.from_arrays(unnest("recording", arrays)),
            measurement.from_arrays(unnest("measured", arrays)),
            seconds_full,
            seconds_skipped,
            tuple(zip(targets, (each.candidate for each in plans), strict=True)),
            float(arrays["floor"]),
            tuple(arrays["seeds"].tolist()),
        )

    def __str__(self) -> str:
        taken = {candidate for _, candidate in self.plans}
        return "\n".join([*self._describe(), *format_rows(self._shown(), taken)])

    __repr__ = __str__

    def _shown(self) -> list[FrontierRow]:
        limits = {self.costs.most_computed(self.num_steps, speedup) for speedup in SHOWN}
        limits |= {len(candidate.computed) for _, candidate in self.plans} | {self.num_steps}
        limits |= {each.num_computed for each in self.measured}
        return self._find_rows(limits)

    def _describe(self) -> list[str]:
        asked = ", ".join(str(target) for target, _ in self.plans)
        recorded = ", ".join(map(str, self.seeds))
        noun = "seed" if len(self.seeds) == 1 else "seeds"
        ms = [f"{1000 * s:.3g} ms" for s in (self.seconds_full, self.seconds_skipped)]
        return [
            f"calibration: {self.num_steps} steps, recorded with {noun} {recorded}; "
            f"a call takes {ms[0]}, a forecast {ms[1]}",
            f"asked for {asked}; floor {self.floor:g} dB; * marks what is taken",
        ]


def format_rows(rows: Sequence[FrontierRow], taken: Collection[Candidate]) -> list[str]:
    """Returns the lines of a table of plans."""
    cells = [
        (
            f"{row.computed}{'*' if row.candidate in taken else ''}",
            f"{row.speedup:.2f}x",
            _format_decibels(row.predicted),
            _format_decibels(row.measured),
            _format_decibels(row.worst),
            row.name,
        )
        for row in rows
    ]
    return format_table(("computed", "speedup", "predicted", "measured", "worst", "plan"), cells)


def _format_decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} dB"


def _explain_floor(
    target: Target, row: FrontierRow | None, above: FrontierRow, floor: float
) -> str:
    found = "no plan that fast" if row is None else f"{row.decibels:.1f} dB at best"
    return (
        f"pabc: {target}: expected {floor:g} dB or more, found {found}; the plan taken is the "
        f"fastest one that has {floor:g} dB: {above.speedup:.2f}x with {above.computed} computed "
        f"steps, {above.decibels:.1f} dB"
    )
