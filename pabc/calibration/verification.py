"""Runs a plan beside the full model, on seeds that may be others than those recorded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from pabc.base.format import format_table
from pabc.calibration.checks import check_calls, check_noise, check_skips, warn_of_chance
from pabc.calibration.progress import Progress
from pabc.calibration.results import decibels
from pabc.calibration.subject import Sample, Subject
from pabc.calibration.target import as_seeds
from pabc.schedule import Schedule


@dataclass(frozen=True)
class Verification:
    """How far a plan's results are from the full ones; printed, a table.

    Attributes:
        label: of the schedule.
        decibels: seed -> PSNR of the result to the full one, whose range is the peak, in dB.
        recorded: seeds among them that the plan was made from.
    """

    label: str
    decibels: dict[int, float]
    recorded: tuple[int, ...] = ()

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return mean(self.decibels.values())

    @property
    def median(self) -> float:
        """The median over seeds."""
        return median(self.decibels.values())

    @property
    def worst(self) -> float:
        """The lowest of all seeds."""
        return min(self.decibels.values())

    def __str__(self) -> str:
        noted = dict.fromkeys(self.recorded, " (recorded)")
        rows = [(f"{s}{noted.get(s, '')}", f"{d:.1f} dB") for s, d in self.decibels.items()]
        shown = {"mean": self.mean, "median": self.median, "worst": self.worst}
        rows += [(name, f"{value:.1f} dB") for name, value in shown.items()]
        return "\n".join([self.label, *format_table(("seed", "PSNR"), rows)])


def verify(
    sample: Sample,
    model: Any,
    seeds: Iterable[int],
    schedule: Schedule,
    *,
    recorded: Iterable[int] = (),
    components: Iterable[str] | None = None,
    progress: bool = True,
) -> Verification:
    """Runs the full model and the schedule with each seed, and returns the PSNR of each.

    Raises ValueError for no seed, or a `sample` that does not call the model, or not with the same
    inputs for the same seed.
    """
    chosen = as_seeds(seeds)
    skipped = {step for step, skips in enumerate(schedule.mask("model")) if skips}
    found = {}
    subject = Subject(model, components=components, timesteps=schedule.timesteps)
    with subject, Progress(progress) as shown:
        shown.expect(2 * len(chosen))
        for seed in chosen:
            shown.begin(f"full, seed {seed}")
            full = subject.run(sample, seed, None)
            check_calls(full)
            shown.finish("done")
            shown.begin(f"plan, seed {seed}")
            fast = subject.run(sample, seed, schedule)
            step = check_noise(fast, full.watch.opening, seed)
            if step is not None:
                warn_of_chance(seed, step)
            check_skips(fast, skipped, subject)
            found[seed] = decibels(full.result, fast.result)
            shown.finish(f"{found[seed]:.1f} dB")
    known = set(recorded)
    return Verification(schedule.label, found, tuple(s for s in chosen if s in known))
