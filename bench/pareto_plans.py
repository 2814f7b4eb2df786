"""Sets up static plans: pabc's own, and those of published rules (`references`), for demo models.

All run through `pabc.compile(..., backend="original")`, which calls the model as it is at computed
steps; nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from case import Ready
from pareto_methods import Choice, Method, NotReached, choose_best
from pareto_setups import Loop, Setup, Subject
from references import dpcache, lemica, teacache
from skips import weigh
from torch import Tensor

import pabc
from pabc.demo import metrics

MAX_GAP = {"LeMiCa": 6, "DPCache": 10}
"""The longest gap between computed calls whose error is measured."""
TEA_THRESHOLDS = tuple(0.01 * 1.35**i for i in range(18))
"""From 0.01 to 1.6; the documentation has 0.05 to 0.6, by model."""


def run_schedule(schedule: pabc.Schedule, setting: str, **facts: Any) -> Choice:
    """Returns the choice of a schedule that skips whole calls."""

    def prepare(loop: Loop) -> Ready:
        fast = pabc.compile(loop.model.transformer, schedule, backend="original")
        return Ready(fast, on_end=fast.reset)

    computed = schedule.num_steps - sum(schedule.mask("model"))
    share = computed / schedule.num_steps
    return Choice(setting, prepare, computed, share, facts, schedule)


def format_steps(steps: Sequence[int]) -> str:
    """Returns steps as ranges, as in `0-4, 7, 9`."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and step == parts[-1][-1] + 1:
            parts[-1].append(step)
        else:
            parts.append([step])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else f"{p[0]}" for p in parts)


def choose_skip(subject: Subject, setup: Setup, computed: int) -> Choice:
    """Returns the rule of `Schedule.skip`, which needs no calibration."""
    timesteps = subject.loop(setup, subject.seen).sampler.timesteps
    schedule = pabc.Schedule.skip(timesteps, computed)
    return run_schedule(schedule, schedule.label)


def choose_lemica(subject: Subject, setup: Setup, computed: int) -> Choice:
    """Returns LeMiCa's path, on segments measured with the seen clips."""
    loop = subject.loop(setup, subject.seen)

    def measure() -> lemica.Weights:
        _, outputs, result = subject.recorded(setup)
        model = subject.model.transformer
        return lemica.measure_segments(loop, model, outputs, result, MAX_GAP["LeMiCa"])

    weights = subject.keep(setup, "segments of LeMiCa", measure)
    try:
        path = lemica.find_path(weights, loop.num_calls, computed)
    except ValueError as error:
        raise NotReached(str(error)) from error
    schedule = pabc.Schedule.skip(loop.sampler.timesteps, path, forecast="hold")
    return run_schedule(schedule, f"computes {format_steps(path)}")


def make_dpcache(subject: Subject, setup: Setup, computed: int) -> list[Choice]:
    """Returns DPCache's path with Taylor's series of order 1 and 2."""
    outputs = subject.recorded(setup).outputs

    def measure() -> Tensor:
        return torch.from_numpy(dpcache.measure_costs(outputs, MAX_GAP["DPCache"]))

    costs = subject.keep(setup, "costs of DPCache", measure)
    try:
        path = dpcache.find_path(costs.numpy(), computed)
    except ValueError as error:
        raise NotReached(str(error)) from error
    timesteps = subject.loop(setup, subject.seen).sampler.timesteps
    forecasts: dict[int, Any] = {1: "linear", 2: _pad(weigh(list(path), len(timesteps)))}
    return [
        run_schedule(
            pabc.Schedule.skip(timesteps, path, forecast=forecast),
            f"order {order}, computes {format_steps(path)}",
        )
        for order, forecast in forecasts.items()
    ]


def _pad(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """Returns rows of weights of equal length: those that are short end with zeros."""
    width = max(map(len, rows))
    return [[*row, *[0.0] * (width - len(row))] for row in rows]


def make_teacache(subject: Subject, setup: Setup, computed: int) -> list[Choice]:
    """Returns TeaCache with its polynomial fitted on the seen clips, by threshold."""

    def fit() -> list[float]:
        loop = subject.loop(setup, subject.seen)
        with teacache.Inputs(subject.model.transformer) as inputs:
            outputs = loop.record().outputs
        return [float(c) for c in teacache.fit(inputs, outputs)]

    coefficients = np.array(subject.keep(setup, "polynomial of TeaCache", fit))

    def make(threshold: float) -> Choice:
        def prepare(loop: Loop) -> Ready:
            model = loop.model.transformer
            return Ready(teacache.TeaCache(model, coefficients, threshold, loop.num_calls))

        return Choice(f"threshold {threshold:.3g}", prepare)

    return list(map(make, TEA_THRESHOLDS))


def choose_pyramid(subject: Subject, setup: Setup, computed: int) -> Choice:
    """Returns the demo's own pyramid, the last one without MLPs, run by the eager backend."""
    loop = subject.loop(setup, subject.seen)
    found = subject.model.pyramids(loop.sampler.timesteps, mlp=False)
    schedule = list(found.values())[-1].schedule

    def compile_model() -> Any:
        return pabc.compile(subject.model.transformer, schedule, backend="eager")

    def prepare(loop: Loop) -> Ready:
        fast = compile_model()
        return Ready(fast, on_end=fast.reset)

    fast = compile_model()
    loop.run(fast)
    share = sum(metrics.flop_shares(fast.plan, fast.explain())) / schedule.num_steps
    return Choice(list(found)[-1], prepare, None, share)


REFERENCES = (
    Method("LeMiCa", "reference, arXiv 2511.00090", choose_lemica),
    Method("DPCache", "reference, arXiv 2602.22654", choose_best("DPCache", make_dpcache)),
    Method("TeaCache", "reference, arXiv 2411.19108", choose_best("TeaCache", make_teacache)),
)
"""Rules of papers, written in this benchmark."""
OWN = (
    Method("pabc pyramid", "regions, without calibration", choose_pyramid, False, True),
    Method("pabc skip", "Schedule.skip by its rule", choose_skip, False),
)
"""The methods of pabc without calibration."""
