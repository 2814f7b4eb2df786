"""Rules by which a node's user says what is skipped."""

from __future__ import annotations

from functools import partial
from math import ceil

from pabc.automatic import auto
from pabc.compiled import CompiledModel
from pabc.pipelines.given import GivenPlans
from pabc.planning import PipelinePlans
from pabc.schedule import Schedule

AUTO = "auto"
_SKIP = "skip: "
RULES = (AUTO, f"{_SKIP}linear", f"{_SKIP}quadratic", f"{_SKIP}hold")
"""A plan that makes itself from a first run; or evenly spread steps, and how the others follow."""


def make_plans(rule: str, speedup: float, model: CompiledModel) -> PipelinePlans:
    """Returns what the runs of a model follow; at a speed-up of 1, they compute all.

    Raises ValueError for an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, found {rule!r}")
    if speedup == 1:
        return GivenPlans(Schedule.none)
    if rule == AUTO:
        return auto(speedup).plans_for({"model": model})
    forecast = rule.removeprefix(_SKIP)
    return GivenPlans(partial(skip_evenly, speedup=speedup, forecast=forecast))


def skip_evenly(steps: tuple[float, ...], *, speedup: float, forecast: str) -> Schedule:
    """Returns the schedule that calls the model at every `speedup`-th of the steps, or more."""
    return Schedule.skip(steps, max(1, ceil(len(steps) / speedup)), forecast=forecast)
