"""Checks results on a GPU: the parts of bench/gpu.py whose rows have `passed`."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import workloads
from rows import Row
from torch import Tensor, nn
from workloads import FRACTION, RANGES, SMALL, TINY, Workload, build, draw

import pabc

NUM_STEPS = 8
BLOCK = 512
"""PyTorch's CUDA allocator rounds sizes up to multiples of this, in bytes."""
Call = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The device and the settings of the parts.

    Attributes:
        is_smoke: True for tiny models, and float32 in place of bfloat16.
        backend: pabc's backend in parts that measure Inductor.
        steps: the number of steps of timed generations.
        rounds: the number of timed generations of each variant.
        folder: where results are written.
        seconds: the time that a task has.
    """

    device: str
    is_smoke: bool
    backend: str
    steps: int
    rounds: int
    folder: Path
    seconds: float = float("inf")

    @property
    def settings(self) -> dict[str, Any]:
        """Returns what rows depend on."""
        names = ("device", "is_smoke", "backend", "steps", "rounds")
        return {name: getattr(self, name) for name in names}

    @property
    def is_cuda(self) -> bool:
        """True on a GPU."""
        return torch.device(self.device).type == "cuda"


def _wan() -> Workload:
    """Returns diffusers' Wan, with full attention, cross attention and rotary positions."""
    config: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 8,
        "freq_dim": 16,
        "ffn_dim": 64,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    latte = TINY["latte"]
    return Workload(
        name="wan",
        build=partial(diffusers.WanTransformer3DModel, **config),
        latents=(4, 3, 12, 8),
        text=(5, 8),
        call=latte.call,
        scheduler=TINY["opensora"].scheduler,
        ranges={"full": RANGES["spatial"], "cross": RANGES["cross"]},
        names={},
    )


MODELS: dict[str, Callable[[], Workload]] = {
    "latte": lambda: TINY["latte"],
    "cogvideox": lambda: TINY["cogvideox"],
    "wan": _wan,
}


def make_schedule(workload: Workload, num_steps: int = NUM_STEPS) -> pabc.Schedule:
    """Returns the schedule 2/4/6 over the middle 70 % of the steps."""
    steps = workloads.timesteps(workload, num_steps)
    return pabc.Schedule.pyramid(steps, fraction=FRACTION, **workload.ranges)


def make_calls(
    workload: Workload, timesteps: Sequence[float], device: str, dtype: torch.dtype
) -> list[Call]:
    """Returns the calls of a generation, equal on all devices, each with new latents."""
    text = draw(workload, 0, device, dtype).text
    calls = []
    for i, timestep in enumerate(timesteps):
        latents = torch.cat([draw(workload, i, device, dtype).latents] * 2)
        when = torch.full((len(latents),), timestep, device=device)
        calls.append(workload.call(latents, when, text))
    return calls


@torch.no_grad()
def run(model: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    """Returns the result of each call of a generation."""
    return [first_of(model(**call)) for call in calls]


def first_of(output: Any) -> Tensor:
    """Returns the tensor in a model's result, which may be a tuple."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def is_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Returns True if the tensors are equal bit for bit."""
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def find_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Returns the maximum error of these tensors, relative to the norm of the expected ones.

    It is 1e9, which fails every bound, if a tensor contains a NaN.
    """
    errors = []
    for x, y in zip(found, expected, strict=True):
        x, y = x.double().cpu(), y.double().cpu()
        errors.append(float((x - y).norm() / y.norm()))
    return max(errors) if all(error == error for error in errors) else float("1e9")


def check_model(name: str, target: Target) -> Iterator[tuple[str, Row]]:
    """Checks the bits of `eager` and of the oracle, and the error of compiled phases."""
    for dtype in (torch.float32, torch.bfloat16):
        for what, row in _check_dtype(MODELS[name](), target, dtype):
            yield f"{str(dtype).removeprefix('torch.')}, {what}", row


def _check_dtype(
    workload: Workload, target: Target, dtype: torch.dtype
) -> Iterator[tuple[str, Row]]:
    model = build(workload, target.device, dtype)
    schedule = make_schedule(workload)
    calls = make_calls(workload, schedule.timesteps, target.device, dtype)
    full = run(model, calls)
    fast = pabc.compile(model, pabc.Schedule.none(schedule.timesteps), backend="eager")
    found = run(fast, calls)
    error = find_error(found, full)
    yield (
        "nothing reused: the model's bits",
        {"passed": is_equal(found, full), "relative_error": error},
    )

    fast.schedule = schedule
    reused = run(fast, calls)
    oracle = run(pabc.compile(model, schedule, backend="oracle"), calls)
    passed = is_equal(reused, oracle) and not is_equal(reused, full) and fast.stats.reused > 0
    row = {
        "passed": passed,
        "relative_error": find_error(reused, oracle),
        "reused": fast.stats.reused,
    }
    yield "reuse: the oracle's bits", row

    yield (
        f"{target.backend}: error against float64",
        check_compiled(workload, model, schedule, target, reused),
    )


def check_compiled(
    workload: Workload,
    model: nn.Module,
    schedule: pabc.Schedule,
    target: Target,
    eager: Sequence[Tensor],
    **options: Any,
) -> Row:
    """Checks that the error of compiled phases is at most twice that of `eager`'s results.

    `options` are those of `pabc.compile`; the backend is the target's, if they name none.
    """
    dtype = eager[0].dtype
    exact = [
        {name: _as_double(x) for name, x in call.items()}
        for call in make_calls(workload, schedule.timesteps, target.device, dtype)
    ]
    double = copy.deepcopy(model).double()
    reference = run(pabc.compile(double, schedule, backend="eager"), exact)
    fast = pabc.compile(model, schedule, **{"backend": target.backend, **options})
    found = run(fast, make_calls(workload, schedule.timesteps, target.device, dtype))
    error, own = find_error(found, reference), find_error(eager, reference)
    allowed = 2 * own + 4 * torch.finfo(dtype).eps
    return {"passed": error <= allowed, "relative_error": error, "eager": own, "allowed": allowed}


def _as_double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def check_guard(target: Target) -> Iterator[tuple[str, Row]]:
    """Checks that a call with the timestep of another step raises: on a GPU, at the next call."""
    workload, wrong = TINY["latte"], 3
    schedule = make_schedule(workload)
    steps = list(schedule.timesteps)
    steps[wrong] = steps[wrong + 2]
    calls = make_calls(workload, steps, target.device, torch.float32)
    fast = pabc.compile(build(workload, target.device), schedule, backend="eager")
    refused, message = None, ""
    for i, call in enumerate(calls):
        try:
            run(fast, [call])
        except pabc.GuardError as error:
            refused, message = i, str(error)
            break
    expected = wrong + target.is_cuda
    yield (
        "another step's timestep",
        {"passed": refused == expected, "call": refused, "expected": expected, "message": message},
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "keep": {},
    "bf16": {"cache_dtype": "bf16"},
    "fp8": {"cache_dtype": "fp8"},
    "offload": {"offload": "cpu"},
    "offload, fp8": {"offload": "cpu", "cache_dtype": "fp8"},
}
"""The ways to keep slots, as options of `pabc.compile`."""


def check_memory(target: Target) -> Iterator[tuple[str, Row]]:
    """Checks each way to keep slots: against the oracle, against a CPU, and its bytes."""
    workload = (TINY if target.is_smoke else SMALL)["latte"]
    schedule = make_schedule(workload)
    on_cpu = _run_options(workload, schedule, "cpu")
    own, allocated = {}, {}
    for name, options in OPTIONS.items():
        model = build(workload, target.device)
        calls = make_calls(workload, schedule.timesteps, target.device, torch.float32)
        fast = pabc.compile(model, schedule, backend="eager", **options)
        own[name] = run(fast, calls)
        oracle = run(pabc.compile(model, schedule, backend="oracle", **options), calls)
        kept = "fp8" if "fp8" in name else name if name == "bf16" else "keep"
        # The rounding of a slot may differ between devices by as much as its own error.
        allowed = find_error(on_cpu[kept], on_cpu["keep"]) + 1e-4
        error = find_error(own[name], on_cpu[kept])
        twin = own[kept] if kept in own else own[name]  # offloading must not change any bit
        row: Row = {
            "passed": is_equal(own[name], oracle)
            and is_equal(own[name], twin)
            and error <= allowed,
            "is_oracle": is_equal(own[name], oracle),
            "is_as_without_offload": is_equal(own[name], twin),
            "relative_error": error,
            "allowed": allowed,
        }
        yield f"{name}: values", row
        row, allocated[name] = _check_bytes(fast, calls, target)
        if "offload" in options and target.is_cuda:
            row["passed"] = allocated[name] <= allocated["keep"]
        yield f"{name}: bytes", row


def _run_options(workload: Workload, schedule: pabc.Schedule, device: str) -> dict[str, Any]:
    calls = make_calls(workload, schedule.timesteps, device, torch.float32)
    found = {}
    for name in ("keep", "bf16", "fp8"):
        model = build(workload, device)
        found[name] = run(pabc.compile(model, schedule, backend="eager", **OPTIONS[name]), calls)
    return found


def _check_bytes(fast: Any, calls: Sequence[Call], target: Target) -> tuple[Row, int]:
    """Checks the bytes of slots: as planned, as counted, and as allocated."""
    counted, allocated = [], []
    for call in calls:
        run(fast, [call])
        counted.append(fast.stats.nbytes)
        if target.is_cuda:
            torch.cuda.synchronize()
            allocated.append(torch.cuda.memory_allocated())
    planned, peak = fast.plan.peak_bytes, fast.stats.peak_nbytes
    row: Row = {"passed": planned == peak, "planned": planned, "counted": peak}
    if not allocated:
        return row, 0
    # After the first step, hoisted values are allocated, and no slot is.
    assert counted[0] == 0
    grown = max(allocated) - allocated[0]
    off = abs(grown - max(counted))
    row.update(allocated=grown, allowed_difference=2 * BLOCK * len(fast.plan.slots))
    row["passed"] = row["passed"] and off <= row["allowed_difference"]
    return row, grown


def check_artifact(target: Target) -> Iterator[tuple[str, Row]]:
    """Checks that a saved and loaded model has equal results, without capture or compilation."""
    workload = TINY["latte"]
    schedule = make_schedule(workload)
    model = build(workload, target.device)
    calls = make_calls(workload, schedule.timesteps, target.device, torch.float32)
    fast = pabc.compile(model, schedule, backend=target.backend)  # type: ignore[arg-type]
    expected = run(fast, calls)
    with tempfile.TemporaryDirectory() as folder:
        path, begin = Path(folder) / "fast.pabc", time.perf_counter()
        fast.save(path)
        saved = time.perf_counter()
        again = pabc.load(path, model)
        found = run(again, calls)
        loaded = time.perf_counter()
        size = path.stat().st_size
    error, counts = find_error(found, expected), again.stats
    yield (
        "save and load",
        {
            "passed": error <= 1e-5 and counts.captures == 0,
            "is_equal": is_equal(found, expected),
            "relative_error": error,
            "captures": counts.captures,
            "compiles": counts.compiles,
            "save_seconds": saved - begin,
            "load_seconds": loaded - saved,
            "bytes": size,
        },
    )
