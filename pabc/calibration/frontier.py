"""The best known plan for each number of computed steps, as measured or as predicted.

Predictions rank plans of one kind well, but are off by a number of decibels that differs between
kinds. So they are corrected by what the measured plans of the same kind showed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pabc.calibration.candidates import KINDS, Candidate, Kind
from pabc.calibration.costs import Costs
from pabc.calibration.measurement import Measurement, full_plan
from pabc.calibration.search import Search

NUM_CANDIDATES = 8
"""The plans of one number of computed steps that are compared by their predictions."""


@dataclass(frozen=True)
class FrontierRow:
    """The best known plan with one number of computed steps.

    Attributes:
        computed: the number of steps that call the model.
        speedup: seconds of all calls of a full generation, over those of this plan.
        predicted: the PSNR in dB, predicted, and corrected by the measured plans of the same kind,
            this one apart.
        measured: the PSNR in dB, mean over the recorded seeds; None: the plan was not run.
        worst: the same, the lowest of all seeds.
        name: how the plan was found.
        candidate: the plan.
    """

    computed: int
    speedup: float
    predicted: float
    measured: float | None
    worst: float | None
    name: str
    candidate: Candidate

    @property
    def decibels(self) -> float:
        """The PSNR in dB: measured, or, if the plan was not run, predicted."""
        return self.predicted if self.measured is None else self.measured


class Corrections:
    """Corrects predictions by how far those of measured plans of the same kind were off."""

    def __init__(self, measured: Sequence[Measurement]) -> None:
        self._offsets: dict[str, dict[int, list[float]]] = {}
        for each in measured:
            offset = each.mean - each.predicted
            if math.isfinite(offset):
                kind = self._offsets.setdefault(each.candidate.name, {})
                kind.setdefault(each.num_computed, []).append(offset)

    def knows(self, candidate: Candidate) -> bool:
        """Returns whether any plan of the candidate's kind was measured."""
        return candidate.name in self._offsets

    def correct(self, candidate: Candidate, predicted: float) -> float:
        """Returns the corrected PSNR: offsets are interpolated over the number of computed steps,
        and constant beyond those that were measured."""
        kind = self._offsets.get(candidate.name)
        if kind is None:
            return predicted
        numbers = sorted(kind)
        offsets = [float(np.mean(kind[number])) for number in numbers]
        return predicted + float(np.interp(len(candidate.computed), numbers, offsets))


def find_frontier(
    search: Search,
    measured: Sequence[Measurement],
    costs: Costs,
    peak: float,
    numbers: Iterable[int] | None = None,
) -> list[FrontierRow]:
    """Returns a row for each of these numbers of computed steps, fewest first.

    By default, for all for which there is a plan. The last row is the full generation.
    """
    n = search.num_steps
    rows = []
    known_numbers = range(search.min_computed, n)
    for computed in known_numbers if numbers is None else sorted({*known_numbers} & {*numbers}):
        known = [each for each in measured if each.num_computed == computed]
        row = (
            _measured_row(known, measured)
            if known
            else _predicted_row(search.candidates(computed, limit=NUM_CANDIDATES), measured, peak)
        )
        if row is not None:
            candidate, predicted, mean, worst = row
            speedup = costs.speedup(n, computed)
            name = candidate.name
            rows.append(FrontierRow(computed, speedup, predicted, mean, worst, name, candidate))
    full = full_plan(n)
    rows.append(FrontierRow(n, 1.0, math.inf, math.inf, math.inf, full.name, full))
    return rows


_Found = tuple[Candidate, float, float | None, float | None]
"""A candidate, its predicted and its measured PSNR, and the worst measured one."""


def _measured_row(known: Sequence[Measurement], measured: Sequence[Measurement]) -> _Found:
    best = best_of(known)
    others = Corrections([each for each in measured if each.plan != best.plan])
    predicted = others.correct(best.candidate, best.predicted)
    return best.candidate, predicted, best.mean, best.worst


def _predicted_row(
    candidates: Sequence[Candidate], measured: Sequence[Measurement], peak: float
) -> _Found | None:
    if not candidates:
        return None
    corrections = Corrections(measured)
    comparable = [each for each in candidates if corrections.knows(each)]
    scored = [
        (corrections.correct(each, each.decibels(peak)), each)
        for each in comparable or candidates[:1]
    ]
    predicted, best = max(scored, key=lambda pair: pair[0])
    return best, predicted, None, None


def best_of(measured: Sequence[Measurement]) -> Measurement:
    """Returns the measurement of the highest merit of those that were run on the most seeds."""
    return max(measured, key=lambda each: (len(each.decibels), each.merit))


def winning_kinds(measured: Sequence[Measurement]) -> tuple[Kind, ...]:
    """Returns the kinds of the best measured plans; without any, the one that is most often best.

    Others need not be searched again: predictions of unlike kinds do not compare.
    """
    numbers = {each.num_computed for each in measured}
    groups = ([each for each in measured if each.num_computed == number] for number in numbers)
    names = {best_of(group).candidate.name for group in groups}
    return tuple(kind for kind in KINDS if kind.name in names) or KINDS[:1]


def best_within(rows: Sequence[FrontierRow], limit: int) -> FrontierRow | None:
    """Returns the row of the best plan that computes at most `limit` steps; None: there is none.

    What was measured with just as many steps is taken, whatever is predicted of fewer.
    """
    within = [row for row in rows if row.computed <= limit]
    if not within:
        return None
    if within[-1].computed == limit and within[-1].measured is not None:
        return within[-1]
    return max(within, key=lambda row: (row.decibels, -row.computed))
