"""Predicts seconds of a generation on several ranks, for `bench/parallel.py`.

seconds of a step = compute seconds of its phase on one rank x FLOPs of a rank / FLOPs of one alone
x crowding + collectives x latency + bytes / bandwidth + agreement
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pabc.explanation import Explanation
from pabc.schedule import Schedule


@dataclass(frozen=True)
class Link:
    """The link between ranks.

    Attributes:
        latency: seconds of a collective without its bytes.
        bandwidth: bytes per second that a rank sends.
        agreement: seconds of the ranks' agreement check, once per step.
    """

    latency: float
    bandwidth: float
    agreement: float = 0.0

    def seconds(self, calls: float, nbytes: float) -> float:
        """Returns the seconds of `calls` collectives, in which a rank sends `nbytes` in all."""
        return calls * self.latency + nbytes / self.bandwidth


@dataclass(frozen=True)
class Cost:
    """The work of one rank in each phase: number of steps; FLOPs, collectives, bytes of a step."""

    steps: Sequence[int]
    flops: Sequence[float]
    calls: Sequence[int]
    nbytes: Sequence[int]

    @classmethod
    def of(cls, found: Explanation, schedule: Schedule) -> Cost:
        """Returns the cost of a schedule, from an explanation that has a plan of any schedule."""
        assert found.plan is not None
        plan, sent = schedule.plan(found.plan.slots), found.communication
        first = [phase.steps[0] for phase in plan.phases]
        regions = np.array([region.flops for region in found.regions], dtype=np.float64)
        flops = ~plan.reuse @ regions + found.flops["outside"]
        none = np.zeros(plan.num_steps, dtype=np.int64)
        calls = none if sent is None else sent.calls_at(plan)
        nbytes = none if sent is None else sent.bytes_at(plan)
        return cls(
            [len(phase.steps) for phase in plan.phases],
            *([each[i].item() for i in first] for each in (flops, calls, nbytes)),
        )


def predict(
    seconds: Sequence[float], alone: Cost, cost: Cost, link: Link, crowding: float = 1.0
) -> float:
    """Returns the predicted seconds of a generation.

    Args:
        seconds: the seconds of a step of each phase on one rank, without others.
        alone: the cost of that rank.
        cost: the cost of a rank among several.
        link: the link between ranks.
        crowding: the factor by which computing is slower because ranks share cores.
    """
    total = 0.0
    for i, steps in enumerate(cost.steps):
        compute = seconds[i] * cost.flops[i] / alone.flops[i] * crowding
        total += steps * (compute + link.seconds(cost.calls[i], cost.nbytes[i]) + link.agreement)
    return total


def fit_link(times: Mapping[int, float], agreement: float) -> Link:
    """Fits a line to the seconds of collectives by bytes sent, with least relative squares."""
    sizes, seconds = np.array(list(times)), np.array(list(times.values()))
    columns = np.stack([np.ones(len(sizes)), sizes], axis=1) / seconds[:, None]
    (latency, per_byte), *_ = np.linalg.lstsq(columns, np.ones(len(sizes)), rcond=None)
    return Link(max(float(latency), 0.0), 1 / max(float(per_byte), 1e-15), agreement)
