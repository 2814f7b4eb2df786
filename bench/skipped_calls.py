"""Measures what a skipped call costs, and whether skipping half of the calls doubles the speed.

Part of `bench/efficiency.py`. Whole sampling loops with `Schedule.skip` at every second step, and
with nothing reused, take turns, both compiled by pabc, then both with `backend="original"`. A row
has the seconds of calls that are computed and that are skipped, dispatch included, as medians over
steps and rounds, and the speedup of the loop, scheduler included: the median of the ratios of
adjacent runs, also as a share of all calls over computed ones, which is the most that it can be.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import report
import workloads

import pabc

BACKENDS = ("inductor", "original")
AIM_SHARE = 0.02
"""A skipped call takes at most this share of a full one."""
AIM_SPEEDUP = 0.95
"""The speedup is at least this share of all calls over computed ones."""


class Loop:
    """A sampling loop with a compiled model, timed as a whole and call by call."""

    def __init__(
        self, workload: workloads.Workload, model: Any, schedule: pabc.Schedule, backend: str
    ) -> None:
        self._workload = workload
        self._start = workloads.draw(workload, 0)
        self.schedule = schedule
        self.fast = pabc.compile(model, schedule, backend=backend)  # type: ignore[arg-type]
        self.calls: list[float] = []

    def run(self) -> float:
        """Returns the seconds of one generation; `calls` has those of its calls."""
        self.calls = []

        def call(**inputs: Any) -> Any:
            start = time.perf_counter()
            found = self.fast(**inputs)
            self.calls.append(time.perf_counter() - start)
            return found

        start = time.perf_counter()
        steps = self.schedule.num_steps
        workloads.denoise(self._workload, call, self._start, steps, workloads.no_context)
        return time.perf_counter() - start


def measure(workload: workloads.Workload, num_steps: int, rounds: int) -> list[dict[str, Any]]:
    """Returns the rows of one model, one per backend."""
    model = workloads.build(workload)
    timesteps = workloads.timesteps(workload, num_steps)
    computed = range(0, num_steps, 2)
    rows = []
    for backend in BACKENDS:
        loops = [
            Loop(workload, model, schedule, backend)
            for schedule in (
                pabc.Schedule.none(timesteps),
                pabc.Schedule.skip(timesteps, computed),
            )
        ]
        first = [loop.run() for loop in loops]
        row = compare(loops, computed, rounds)
        rows.append({"model": workload.name, "backend": backend, "first_seconds": first, **row})
    return rows


def compare(loops: Sequence[Loop], computed: Sequence[int], rounds: int) -> dict[str, Any]:
    """Runs both loops in turn; returns seconds, shares and speedups."""
    full, skipping = loops
    ratios, seconds = [], {"full": [], "computed": [], "skipped": []}
    for turn in range(rounds):
        order = (full, skipping) if turn % 2 == 0 else (skipping, full)
        taken = {id(loop): loop.run() for loop in order}
        ratios.append(taken[id(full)] / taken[id(skipping)])
        seconds["full"] += full.calls[1:]  # the first call computes hoisted values
        for step, each in enumerate(skipping.calls):
            if step:
                seconds["computed" if step in computed else "skipped"].append(each)
    medians = {name: report.summarize(each, 6) for name, each in seconds.items()}
    stats, num_computed = skipping.fast.stats, skipping.fast.plan.num_model_calls
    if stats.fallbacks or num_computed != len(computed):
        raise RuntimeError(
            f"skipped calls: expected {len(computed)} computed calls and no fallback, found"
            f" {num_computed} and {dict(stats.fallbacks)}"
        )
    bound = len(full.calls) / num_computed
    speedup = statistics.median(ratios)
    return {
        "calls": len(full.calls),
        "computed": num_computed,
        "seconds": medians,
        "share": round(medians["skipped"]["median"] / medians["full"]["median"], 5),
        "speedup": round(speedup, 4),
        "of_bound": round(speedup / bound, 4),
        "compiles": [loop.fast.stats.compiles for loop in loops],
    }


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the table of skipped calls."""
    header = ("model", "backend", "full call, ms", "computed", "skipped", "share", "speedup")
    lines = [
        (
            row["model"],
            row["backend"],
            *(f"{1e3 * row['seconds'][n]['median']:.3f}" for n in ("full", "computed", "skipped")),
            f"{row['share']:.2%}{'' if row['share'] <= AIM_SHARE else ' !'}",
            f"{row['speedup']:.3f}",
            f"{row['of_bound']:.3f}{'' if row['of_bound'] >= AIM_SPEEDUP else ' !'}",
        )
        for row in rows
    ]
    return report.format_table((*header, "of calls / computed"), lines)
