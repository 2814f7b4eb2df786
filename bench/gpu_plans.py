"""Checks plans that make themselves on a GPU: a part of bench/gpu.py."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from gpu_checks import Target, find_error
from rows import Row
from torch import Tensor
from workloads import TINY, build, denoise, draw, no_context

import pabc

NUM_STEPS = 12
CALLS = 7


def request(calls: int) -> pabc.automatic.request.Auto:
    """Returns a request for a plan of so many calls, however far it is from the full result.

    Models with random weights follow no smooth trajectory.
    """
    return pabc.auto(calls=calls, floor=1.0, candidates=2, cache=False)


def check_auto(target: Target) -> Iterator[tuple[str, Row]]:
    """Checks that the first generation is computed in full, and that the next follows a plan."""
    workload = TINY["latte"]
    model = build(workload, target.device)
    starts = [draw(workload, seed, target.device) for seed in (0, 1)]

    def sample(called: object, seed: int) -> Tensor:
        return denoise(workload, called, starts[seed], NUM_STEPS, no_context)  # type: ignore[arg-type]

    full = [sample(model, seed) for seed in (0, 1)]
    for backend in dict.fromkeys(("eager", target.backend)):
        fast = pabc.compile(model, request(CALLS), backend=backend)  # type: ignore[arg-type]
        first = sample(fast, 0)
        with warnings.catch_warnings(record=True) as warned:
            fast.reset()
        error = find_error([first], [full[0]])
        row: Row = {"relative_error": error, "warnings": [str(each.message) for each in warned]}
        is_right = torch.equal(first, full[0]) if backend == "eager" else error <= 1e-4
        yield f"{backend}: recorded in full", {"passed": is_right, **row}
        second = sample(fast, 1)
        given = pabc.compile(model, fast.current.schedule, backend=backend)  # type: ignore[arg-type]
        difference = find_error([second], [sample(given, 1)])
        yield f"{backend}: follows the plan", _check_plan(fast, second, full[1], difference)


def _check_plan(fast: pabc.CompiledModel, found: Tensor, full: Tensor, difference: float) -> Row:
    """Checks a generation against its plan: the calls computed, and the result.

    `difference`: from the result of the same schedule, given to another compiled model.
    """
    counts = fast.stats
    skipped = NUM_STEPS - CALLS
    is_planned = counts.recorded == 1 and counts.reused == skipped and not counts.fallbacks
    return {
        "passed": is_planned and difference <= 1e-5,
        "reused": counts.reused,
        "expected": skipped,
        "fallbacks": dict(counts.fallbacks),
        "difference": difference,
        "distance": find_error([found], [full]),
        "plan": counts.plan_source,
    }
