"""Measures ceilings, CUDA graphs and memory on a GPU: parts of bench/gpu.py."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from case import Ready
from gpu_checks import OPTIONS, Target, find_error, make_calls, make_schedule, run
from gpu_loops import make_case, time_variants, type_of
from rows import Row
from torch import Tensor
from triton.testing import do_bench
from workloads import FULL, SMALL, TINY, build

import pabc

SIDE = 8192
COPIED = 2**32


def measure_ceilings(target: Target) -> Iterator[tuple[str, Row]]:
    """Measures what the GPU does at most: bytes copied and operations of a product, a second."""
    if not target.is_cuda:
        yield "device", {"missing": "a GPU"}
        return
    new = {"device": target.device, "dtype": torch.bfloat16}
    source = torch.randn(COPIED // 2, **new)  # type: ignore[call-overload]
    place = torch.empty_like(source)
    copying = do_bench(lambda: place.copy_(source), quantiles=[0.5])
    a, b = torch.randn(2, SIDE, SIDE, **new)  # type: ignore[call-overload]
    product = do_bench(lambda: a @ b, quantiles=[0.5])
    free, total = torch.cuda.mem_get_info()
    yield (
        "device",
        {
            "copied_gigabytes_per_second": 2 * COPIED / copying / 1e6,
            "bf16_teraflops_per_second": 2 * SIDE**3 / product / 1e9,
            "free_bytes": free,
            "total_bytes": total,
        },
    )


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


def compare_graphs(target: Target, *, is_timed: bool) -> Iterator[tuple[str, Row]]:
    """Compares CUDA graphs with phases that are launched kernel by kernel: values, and times."""
    if not target.is_cuda:
        yield "option", {"missing": "a CUDA graph needs a GPU"}
        return
    case = make_case((TINY if target.is_smoke else SMALL)["latte"], target)
    ready, outputs = {}, {}
    for name, options in {"pabc": {}, "pabc, CUDA graphs": {"cudagraphs": True}}.items():
        fast = pabc.compile(case.model, case.schedule, backend=target.backend, **options)  # type: ignore[arg-type]
        calls = make_calls(case.workload, case.schedule.timesteps, target.device, type_of(target))
        for _ in range(3):  # run, recorded, replayed
            outputs[name] = [x.clone() for x in run_one_by_one(fast, calls)]
        ready[name] = Ready(fast, on_end=fast.reset)
    error = find_error(outputs["pabc, CUDA graphs"], outputs["pabc"])
    passed = error <= torch.finfo(type_of(target)).eps
    recordings = ready["pabc, CUDA graphs"].call.stats.recordings  # type: ignore[attr-defined]
    row: Row = {"passed": passed and recordings > 0, "relative_error": error}
    yield "values", {**row, "recordings": recordings}
    if passed and is_timed:
        plans = {name: each.call.plan for name, each in ready.items()}  # type: ignore[attr-defined]
        for times in time_variants(case, ready, target, target.rounds, plans):
            yield "time", times


def run_one_by_one(model: Any, calls: Sequence[dict[str, Any]]) -> Iterator[Tensor]:
    """Yields the result of each call before the next call, which may overwrite it."""
    for call in calls:
        yield from run(model, [call])
