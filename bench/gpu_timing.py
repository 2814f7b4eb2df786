"""Measures the seconds and the memory of whole loops on a GPU: parts of bench/gpu.py."""

from __future__ import annotations

import contextlib
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import kernel_attention
import kernel_encode_rows
import kernel_joint_norm
import kernel_permute_copy
import kernel_residual_norm
import kernel_short_attention
import kernel_text_attention
import report
import torch
from case import Case, Ready, first_line
from gpu_checks import OPTIONS, Target, find_error, first_of, make_calls, make_schedule, run
from rows import Row
from torch import Tensor
from variants import VARIANTS
from workloads import FULL, SMALL, TINY, Workload, build, denoise, draw

import pabc

KERNELS = (
    kernel_short_attention,
    kernel_attention,
    kernel_text_attention,
    kernel_residual_norm,
    kernel_joint_norm,
    kernel_encode_rows,
    kernel_permute_copy,
)
"""Benchmarks of kernels."""
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""A variant is timed only if its first step has at most this error relative to eager's."""


def type_of(target: Target) -> torch.dtype:
    """Returns the dtype of timed models."""
    return torch.float32 if target.is_smoke else torch.bfloat16


def time_loops(name: str, target: Target) -> Iterator[tuple[str, Row]]:
    """Times whole loops of one model: each variant that is ready takes turns with earlier ones.

    torch.compile comes last: it takes longest to be ready, and may be stopped.
    """
    case = make_case((TINY if target.is_smoke else FULL)[name], target)
    variants = ["eager", "pabc", "torch.compile"]
    if target.backend == "eager":
        variants = ["eager", "pabc eager"]
    with torch.no_grad():
        reference = first_of(case.model(**case.example))
    ready: dict[str, Ready] = {}
    for variant in variants:
        made, row = _prepare(variant, case, reference)
        yield f"prepare {variant}", row
        if made is None:
            continue
        ready[variant] = made
        if len(ready) > 1:
            yield f"time {', '.join(ready)}", time_variants(case, ready, target)


def make_case(workload: Workload, target: Target) -> Case:
    """Returns a model with its loop, scheduled 2/4/6."""
    dtype = type_of(target)
    model = build(workload, target.device, dtype)
    start = draw(workload, 0, target.device, dtype)
    return Case(workload, model, start, make_schedule(workload, target.steps))


def _prepare(variant: str, case: Case, reference: Tensor) -> tuple[Ready | None, Row]:
    """Returns a prepared variant if it runs and its first step agrees with the model's."""
    begin = time.perf_counter()
    try:
        ready = VARIANTS[variant].prepare(case)
        with torch.no_grad():
            first = first_of(ready.call(**case.example))
        ready.on_end()
        error = find_error([first], [reference])
    except Exception as raised:
        return None, {"error": first_line(raised)}
    row: Row = {"seconds": time.perf_counter() - begin, "relative_error": error, "note": ready.note}
    row["passed"] = error <= ALLOWED[reference.dtype]
    if isinstance(ready.call, pabc.CompiledModel):
        row["phases"] = len(ready.call.plan.phases)
        row["compile_seconds"] = ready.call.explain().compile_seconds
    return ready if row["passed"] else None, row


def time_variants(case: Case, ready: Mapping[str, Ready], target: Target) -> Row:
    """Times generations in turn, after one warm-up each; adds speedups over the first variant."""
    measured: dict[str, list[Row]] = {name: [] for name in ready}
    order = list(ready)
    for i in range(-1, target.rounds):
        for j in range(len(order)):
            name = order[(i + j) % len(order)]
            row = _generate(case, ready[name], target)
            if i >= 0:
                measured[name].append(row)
    found = {name: _summarize(rows, ready[name]) for name, rows in measured.items()}
    pace = {name: row["seconds"]["median"] for name, row in found.items()}
    base = pace[order[0]]
    return {
        "shapes": case.workload.shapes,
        "dtype": str(case.start.latents.dtype),
        "steps": case.num_steps,
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


def _summarize(rows: Sequence[Row], ready: Ready) -> Row:
    """Returns medians with spread; for pabc, also of the steps of each phase."""
    steps = [statistics.median(each) for each in zip(*(r["steps"] for r in rows), strict=True)]
    row: Row = {
        "seconds": report.summarize([r["seconds"] for r in rows], 5),
        "step_seconds": report.summarize(steps, 6),
        "peak_bytes": rows[-1]["peak_bytes"],
    }
    if isinstance(ready.call, pabc.CompiledModel):
        row["phases"] = {
            str(phase.index): {
                "steps": len(phase.steps),
                "reused": len(phase.reused),
                "seconds": report.summarize([steps[i] for i in phase.steps], 6),
            }
            for phase in ready.call.plan.phases
        }
        row["slot_bytes"] = ready.call.plan.peak_bytes
    return row


def measure_memory(target: Target) -> Iterator[tuple[str, Row]]:
    """Measures the peak of allocated bytes: of the model, then for each way to keep slots."""
    workload, dtype = (TINY if target.is_smoke else FULL)["latte"], type_of(target)
    schedule = make_schedule(workload)
    model = build(workload, target.device, dtype)
    calls = make_calls(workload, schedule.timesteps, target.device, dtype)
    yield "eager model", _find_peak(model, calls, target)
    for name in ("keep", "fp8", "offload"):
        fast = pabc.compile(model, schedule, backend="eager", **OPTIONS[name])
        run(fast, calls)
        row = _find_peak(fast, calls, target)
        planned, counted = fast.plan.peak_bytes, fast.stats.peak_nbytes
        yield name, {**row, "passed": planned == counted, "planned": planned, "counted": counted}


def _find_peak(model: Any, calls: Sequence[dict[str, Any]], target: Target) -> Row:
    gc.collect()
    if not target.is_cuda:
        run(model, calls)
        return {"peak_bytes": None}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for call in calls:
        run(model, [call])
    torch.cuda.synchronize()
    return {"peak_bytes": torch.cuda.max_memory_allocated(), "before": before}


def time_graphs(target: Target) -> Iterator[tuple[str, Row]]:
    """Compares CUDA graphs with phases that are launched kernel by kernel: values, then times."""
    if not target.is_cuda:
        yield "option", {"missing": "a CUDA graph needs a GPU"}
        return
    case = make_case((TINY if target.is_smoke else SMALL)["latte"], target)
    ready = {}
    outputs = {}
    for name, options in {"pabc": {}, "pabc, CUDA graphs": {"cudagraphs": True}}.items():
        fast = pabc.compile(case.model, case.schedule, backend=target.backend, **options)  # type: ignore[arg-type]
        calls = make_calls(case.workload, case.schedule.timesteps, target.device, type_of(target))
        for _ in range(2):  # the first generation may record what the second one replays
            outputs[name] = [x.clone() for x in run_one_by_one(fast, calls)]
        ready[name] = Ready(fast, on_end=fast.reset)
    error = find_error(outputs["pabc, CUDA graphs"], outputs["pabc"])
    passed = error <= torch.finfo(type_of(target)).eps
    yield "values", {"passed": passed, "relative_error": error}
    if passed:
        yield "time", time_variants(case, ready, target)


def run_one_by_one(model: Any, calls: Sequence[dict[str, Any]]) -> Iterator[Tensor]:
    """Yields the result of each call before the next call, which may overwrite it."""
    for call in calls:
        yield from run(model, [call])


def run_kernels(target: Target) -> Iterator[tuple[str, Row]]:
    """Runs the kernels' tests, then times them; on a CPU, only checks a tiny shape of each."""
    if target.is_cuda:
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "kernels", "tests"]
        done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True)
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        yield "tests", {"passed": done.returncode == 0, "result": last}
    for benchmark in KERNELS:
        shapes = benchmark.SHAPES if target.is_cuda else benchmark.SMOKE
        for name, sizes in shapes.items():
            yield f"{benchmark.KERNEL}: {name}", benchmark.measure(name, sizes, target.device)
