"""Checks and times calls, stacks and blocks that are forecast, on a GPU: parts of bench/gpu.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from case import Ready
from gpu_checks import Target, check_compiled, find_error, is_equal, make_calls, run
from gpu_loops import make_case, time_variants, type_of
from gpu_timing import run_one_by_one
from rows import Row
from workloads import SMALL, TINY, build, timesteps

import pabc

NUM_STEPS = 8
COMPUTED = (0, 1, 2, 4, 7)
"""The steps that compute: one gap of a step, and one of two."""
COMPILED = ("model, linear", "stack, linear", "model held, attention in between")
"""The schedules whose phases are compiled as well, which takes longest."""


def make_schedules(steps: list[float]) -> dict[str, pabc.Schedule]:
    """Returns schedules of each coarse kind, with forecasts of one, two and three values."""
    skip = pabc.Schedule.skip
    return {
        "model, linear": skip(steps, COMPUTED),
        "model, quadratic": skip(steps, COMPUTED, forecast="quadratic"),
        "stack, linear": skip(steps, COMPUTED, kind="stack"),
        "block, quadratic": skip(steps, COMPUTED, kind="block", forecast="quadratic"),
        "model held, attention in between": pabc.Schedule.pyramid(
            steps, spatial=2, cross=4, model=3, forecast={"spatial": "linear"}
        ),
    }


def check_skips(target: Target) -> Iterator[tuple[str, Row]]:
    """Checks bits of eager and oracle in both dtypes, and Inductor's error in float32."""
    workload = TINY["latte"]
    steps = timesteps(workload, NUM_STEPS)
    for dtype in (torch.float32, torch.bfloat16):
        model = build(workload, target.device, dtype)
        calls = make_calls(workload, steps, target.device, dtype)
        for name, schedule in make_schedules(steps).items():
            label = f"{str(dtype).removeprefix('torch.')}, {name}"
            fast = pabc.compile(model, schedule, backend="eager")
            found = run(fast, calls)
            oracle = run(pabc.compile(model, schedule, backend="oracle"), calls)
            row: Row = {
                "passed": is_equal(found, oracle) and fast.stats.reused > 0,
                "relative_error": find_error(found, oracle),
                "fallbacks": dict(fast.stats.fallbacks),
            }
            row["passed"] = row["passed"] and not row["fallbacks"]
            yield f"{label}: the oracle's bits", row
            if dtype == torch.float32 and name in COMPILED:
                yield (
                    f"{label}: {target.backend}'s error against float64",
                    check_compiled(workload, model, schedule, target, found),
                )
            if set(schedule.masks) == {"model"}:
                original = pabc.compile(model, schedule, backend="original")
                passed = is_equal(run(original, calls), found)
                yield f"{label}: the original model's bits", {"passed": passed}


def check_graphs(target: Target) -> Iterator[tuple[str, Row]]:
    """Checks that CUDA graphs give what phases give, and that kept results do not change."""
    if not target.is_cuda:
        yield "option", {"missing": "a CUDA graph needs a GPU"}
        return
    workload = TINY["latte"]
    steps = timesteps(workload, NUM_STEPS)
    model = build(workload, target.device)
    calls = make_calls(workload, steps, target.device, torch.float32)
    schedules = make_schedules(steps)
    for name in COMPILED:
        schedule = schedules[name]
        options = {"backend": target.backend, "cudagraphs": True}
        fast = pabc.compile(model, schedule, **options)  # type: ignore[arg-type]
        plain = pabc.compile(model, schedule, backend=target.backend)  # type: ignore[arg-type]
        expected = run(plain, calls)
        for _ in range(2):  # the first generation may record what the second one replays
            found = [x.clone() for x in run_one_by_one(fast, calls)]
        error = find_error(found, expected)
        passed = error <= 8 * torch.finfo(torch.float32).eps
        yield f"{name}: values", {"passed": passed, "relative_error": error}


def check_results(target: Target) -> Iterator[tuple[str, Row]]:
    """Checks that what is done to the result of a step changes no later result."""
    workload = TINY["latte"]
    steps = timesteps(workload, NUM_STEPS)
    model = build(workload, target.device)
    calls = make_calls(workload, steps, target.device, torch.float32)
    schedule = pabc.Schedule.skip(steps, COMPUTED)
    backends = dict.fromkeys(("eager", target.backend, "original"))
    for backend in backends:
        expected = run(pabc.compile(model, schedule, backend=backend), calls)  # type: ignore[arg-type]
        fast = pabc.compile(model, schedule, backend=backend)  # type: ignore[arg-type]
        found = []
        for result in run_one_by_one(fast, calls):
            found.append(result.clone())
            result.fill_(float("nan"))
        yield f"{backend}: results are fresh", {"passed": is_equal(found, expected)}


def time_skips(target: Target) -> Iterator[tuple[str, Row]]:
    """Times loops without reuse, and with every second call skipped, also as CUDA graphs."""
    case = make_case((TINY if target.is_smoke else SMALL)["latte"], target)
    steps = case.schedule.timesteps
    skip = pabc.Schedule.skip(steps, range(0, len(steps), 2))
    options = {"no reuse": {}, "skip 2x": {}}
    if target.is_cuda:
        options["skip 2x, CUDA graphs"] = {"cudagraphs": True}
    ready = {}
    for name, more in options.items():
        schedule = pabc.Schedule.none(steps) if name == "no reuse" else skip
        fast = pabc.compile(case.model, schedule, backend=target.backend, **more)  # type: ignore[arg-type]
        calls = make_calls(case.workload, steps, target.device, type_of(target))
        for _ in range(2):
            for _result in run_one_by_one(fast, calls):
                pass
        ready[name] = Ready(fast, on_end=fast.reset)
    plans = {name: each.call.plan for name, each in ready.items()}  # type: ignore[attr-defined]
    for row in time_variants(case, ready, target, target.rounds, plans):
        yield "time", row
