"""Times whole sampling loops on a GPU, variants in turn: parts of bench/gpu.py."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import report
import torch
from case import Case, Ready, first_line
from gpu_checks import Target, find_error, first_of, make_schedule
from gpu_kernels import follow_gains
from gpu_plans import request
from rows import Row
from torch import Tensor
from variants import VARIANTS
from workloads import FULL, TINY, Workload, build, denoise, draw

import pabc

ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""A variant is timed only if its first step has at most this error relative to eager's."""
COMPILED = "torch.compile"
Prepare = Callable[[Case], Ready]


def type_of(target: Target) -> torch.dtype:
    """Returns the dtype of timed models."""
    return torch.float32 if target.is_smoke else torch.bfloat16


def make_case(workload: Workload, target: Target) -> Case:
    """Returns a model with its loop, scheduled 2/4/6."""
    dtype = type_of(target)
    model = build(workload, target.device, dtype)
    start = draw(workload, 0, target.device, dtype)
    return Case(workload, model, start, make_schedule(workload, target.steps))


def list_pabc(case: Case, target: Target) -> dict[str, Prepare]:
    """Returns pabc's variants. One compiled model serves all, so what they share is made once."""
    steps = case.schedule.timesteps
    computed = len(steps) // 2
    fast = pabc.compile(case.model, request(computed), backend=target.backend)  # type: ignore[arg-type]
    schedules = {
        "pabc, all computed": pabc.Schedule.none(steps),
        "pabc pyramid": case.schedule,
        "pabc skip 2x": pabc.Schedule.skip(steps, computed),
    }
    found: dict[str, Prepare] = {
        name: lambda _, schedule=schedule: _follow(fast, schedule)  # type: ignore[misc]
        for name, schedule in schedules.items()
    }
    return {**found, "pabc auto 2x": lambda case: _record(fast, case)}


def _follow(fast: pabc.CompiledModel, schedule: pabc.Schedule) -> Ready:
    trajectory = fast.trajectory(schedule, private=True)
    return Ready(fast, lambda index, timestep: trajectory, trajectory.reset, schedule.label)


def _record(fast: pabc.CompiledModel, case: Case) -> Ready:
    """Runs the generation that is recorded, and plans the next ones."""
    ready = Ready(fast, on_end=fast.reset)
    begin = time.perf_counter()
    case.generate(ready)
    middle = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weights are random: the plan may be far off
        fast.reset()
    seconds = f"recorded in {middle - begin:.1f} s, planned in {time.perf_counter() - middle:.1f} s"
    ready.note = f"{seconds}; {fast.stats.plan_source}"
    return ready


@dataclass
class Contest:
    """The variants of one model that are ready, which take turns.

    Attributes:
        first: what the model returns at the first step, and its last latents.
        ready: the variants by name.
        plans: what each step of pabc's variants does.
    """

    case: Case
    target: Target
    first: tuple[Tensor, Tensor] | None = None
    ready: dict[str, Ready] = field(default_factory=dict)
    plans: dict[str, pabc.Plan] = field(default_factory=dict)

    def enter(self, name: str, prepare: Prepare) -> Row:
        """Prepares a variant and runs it once: it takes part if its first step is right.

        The first one is what the others are compared with.
        """
        begin = time.perf_counter()
        try:
            ready = prepare(self.case)
            found = self._run_once(ready)
        except Exception as error:
            traceback.print_exc()
            return {"error": first_line(error)}
        self.first = self.first or found
        error, distance = (find_error([x], [y]) for x, y in zip(found, self.first, strict=True))
        row: Row = {
            "passed": error <= ALLOWED[found[0].dtype],
            "seconds": time.perf_counter() - begin,
            "first_step_error": error,
            "distance": distance,
            "note": ready.note,
        }
        if isinstance(ready.call, pabc.CompiledModel):
            self.plans[name] = plan = ready.call.plan
            row.update(calls=plan.num_model_calls, phases=len(plan.phases))
        if row["passed"]:
            self.ready[name] = ready
        return row

    def _run_once(self, ready: Ready) -> tuple[Tensor, Tensor]:
        """Returns the result of the first step of a generation, and its last latents."""
        first: list[Tensor] = []

        def call(**inputs: Any) -> Any:
            output = ready.call(**inputs)
            if not first:
                first.append(first_of(output).clone())
            return output

        case = self.case
        latents = denoise(case.workload, call, case.start, case.num_steps, ready.on_step)
        ready.on_end()
        return first[0], latents

    def time(self, rounds: int) -> Iterator[Row]:
        """Times all variants in turn; yields the row after each round."""
        return time_variants(self.case, self.ready, self.target, rounds, self.plans)


def list_variants(case: Case, target: Target, which: str) -> dict[str, Prepare]:
    """Returns the ways to run a model: `which` is "pabc", "torch.compile" or "all".

    torch.compile comes last: it takes longest to be ready, and may be stopped.
    """
    found: dict[str, Prepare] = {"eager": VARIANTS["eager"].prepare}
    if which in ("pabc", "all"):
        found |= list_pabc(case, target)
    if which in (COMPILED, "all") and target.backend == "inductor":
        found[COMPILED] = VARIANTS[COMPILED].prepare
    return found


def prepare_loops(name: str, which: str, target: Target) -> Iterator[tuple[str, Row]]:
    """Compiles a model at its published size, and checks its first step; nothing is timed.

    What is compiled stays in the caches of Inductor and Triton for the loops that are timed.
    """
    case = make_case((TINY if target.is_smoke else FULL)[name], target)
    contest = Contest(case, target)
    for variant, prepare in list_variants(case, target, which).items():
        yield variant, contest.enter(variant, prepare)


def time_loops(name: str, target: Target) -> Iterator[tuple[str, Row]]:
    """Times whole loops of one model: once before torch.compile is ready, then all in turn."""
    yield "kernels", {"gains": follow_gains(target.folder)}
    case = make_case((TINY if target.is_smoke else FULL)[name], target)
    contest = Contest(case, target)
    for variant, prepare in list_variants(case, target, "all").items():
        if variant == COMPILED:
            for row in contest.time(1):
                yield "time", row
        yield f"prepare {variant}", contest.enter(variant, prepare)
    for row in contest.time(target.rounds):
        yield "time", row


def time_variants(
    case: Case,
    ready: Mapping[str, Ready],
    target: Target,
    rounds: int,
    plans: Mapping[str, pabc.Plan],
) -> Iterator[Row]:
    """Times generations in turn; yields a row after each round, with speedups over the first.

    Each variant has run before, so nothing is compiled here.
    """
    measured: dict[str, list[Row]] = {name: [] for name in ready}
    order = list(ready)
    for i in range(rounds):
        for j in range(len(order)):
            name = order[(i + j) % len(order)]
            measured[name].append(_generate(case, ready[name], target))
        found = {name: _summarize(rows, plans.get(name)) for name, rows in measured.items()}
        pace = {name: row["seconds"]["median"] for name, row in found.items()}
        base = pace[order[0]]
        yield {
            "shapes": case.workload.shapes,
            "dtype": str(case.start.latents.dtype),
            "steps": case.num_steps,
            "rounds": i + 1,
            "variants": found,
            "speedup": {name: round(base / seconds, 3) for name, seconds in pace.items()},
        }


def _generate(case: Case, ready: Ready, target: Target) -> Row:
    """Returns seconds of one generation and of its steps, and the peak of allocated bytes."""
    gc.collect()
    if target.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    marks: list[Any] = []

    @contextlib.contextmanager
    def on_step(index: int, timestep: Tensor) -> Iterator[None]:
        marks.append(_mark(target))
        with ready.on_step(index, timestep):
            yield
        marks.append(_mark(target))

    _wait(target)
    begin = time.perf_counter()
    denoise(case.workload, ready.call, case.start, case.num_steps, on_step)
    _wait(target)
    seconds = time.perf_counter() - begin
    ready.on_end()
    spans = zip(marks[::2], marks[1::2], strict=True)
    peak = torch.cuda.max_memory_allocated() if target.is_cuda else None
    return {"seconds": seconds, "steps": [_span(*pair) for pair in spans], "peak_bytes": peak}


def _wait(target: Target) -> None:
    if target.is_cuda:
        torch.cuda.synchronize()


def _mark(target: Target) -> Any:
    """Records the current time; on a GPU, as an event on its stream."""
    if not target.is_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _span(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return float(end - begin)
    return float(begin.elapsed_time(end)) / 1e3


def _summarize(rows: Sequence[Row], plan: pabc.Plan | None) -> Row:
    """Returns medians with spread; with a plan, also of the steps of each phase."""
    steps = [statistics.median(each) for each in zip(*(r["steps"] for r in rows), strict=True)]
    row: Row = {
        "seconds": report.summarize([r["seconds"] for r in rows], 5),
        "step_seconds": report.summarize(steps, 6),
        "peak_bytes": rows[-1]["peak_bytes"],
    }
    if plan is not None:
        row["phases"] = {
            str(phase.index): {
                "steps": len(phase.steps),
                "reused": len(phase.reused),
                "seconds": report.summarize([steps[i] for i in phase.steps], 6),
            }
            for phase in plan.phases
        }
        row["slot_bytes"] = plan.peak_bytes
    return row


def format_times(rows: Mapping[str, Row]) -> str:
    """Returns the table of timed variants."""
    header = ("variant", "s a generation (min to max)", "ms a step", "speedup", "peak GiB")
    lines = []
    for name, row in rows.items():
        for variant, found in row.get("variants", {}).items():
            peak = found["peak_bytes"]
            lines.append(
                (
                    f"{name.rpartition(':')[0]}: {variant}",
                    report.format_spread(found["seconds"]),
                    f"{1e3 * found['step_seconds']['median']:.1f}",
                    f"{row['speedup'][variant]:.2f}",
                    None if peak is None else f"{peak / 2**30:.2f}",
                )
            )
    return report.format_table(header, lines)
