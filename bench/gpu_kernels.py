"""Tests, checks and times the Triton kernels on a GPU: parts of bench/gpu.py.

What was gained is written beside the rows, as `gains.json`: the loops that are timed afterwards
follow it, and `bench/gpu.py --record FOLDER` adds it to the table of the package.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
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
from gpu_checks import MODELS, Target, check_compiled, make_calls, make_schedule, run
from kernel_timing import Benchmark
from rows import Row
from workloads import build

import pabc
from pabc.kernels import gains

BENCHMARKS: Mapping[str, Benchmark] = {
    benchmark.KERNEL: benchmark  # type: ignore[misc]
    for benchmark in (
        kernel_attention,
        kernel_residual_norm,
        kernel_short_attention,
        kernel_text_attention,
        kernel_joint_norm,
        kernel_encode_rows,
        kernel_permute_copy,
    )
}
"""The kernels' benchmarks by kernel, those of the most work first."""
TESTS = {
    "kernels": [f"tests/test_{kernel}.py" for kernel in BENCHMARKS],
    "lowering": ["tests/test_lower.py", "tests/test_lower_*.py", "tests/test_registration.py"],
}
"""The files of the kernels' own tests, and of those that put kernels into graphs."""
GAINS = "gains.json"
TIMES = "kernel"
"""The tasks of kernels' times are named `kernel <name>`."""
_RESULT = re.compile(
    r"(?P<name>\S+::.*?) (?P<result>PASSED|FAILED|ERROR|SKIPPED)\b"
    r"|\[gw\d+\] \[ *\d+%\] (?P<its_result>[A-Z]+) (?P<its_name>\S+::.*)"
)
"""A line of pytest that says how a test ended, or one of pytest-xdist."""


def run_tests(which: str, target: Target) -> Iterator[tuple[str, Row]]:
    """Runs tests of kernels on the GPU; counts results as they come in."""
    if not target.is_cuda:
        yield "tests", {"missing": "a GPU; `pytest -m kernels` runs them in Triton's interpreter"}
        return
    files = [str(path) for each in TESTS[which] for path in sorted(report.ROOT.glob(each))]
    yield from count_tests(["-m", "kernels and not slow", *files], target.seconds - 10)


def count_tests(arguments: Sequence[str], seconds: float) -> Iterator[tuple[str, Row]]:
    """Runs pytest for at most so many seconds; yields the row of results as they come in."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider"]
    command += ["-v", "--tb=short", "--color=no", *arguments]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(max(1, (os.cpu_count() or 1) // 2))]
    deadline, row = time.monotonic() + seconds, dict[str, Any]()
    counts: dict[str, int] = {}
    failed: list[str] = []
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=report.ROOT, text=True, **pipes) as process:
        for line in _read_lines(process, deadline):
            print(line, end="", flush=True)
            found = _RESULT.match(line)
            if found is None:
                continue
            result = (found["result"] or found["its_result"]).lower()
            counts[result] = counts.get(result, 0) + 1
            if result in ("failed", "error"):
                failed.append(found["name"] or found["its_name"])
            row = {"passed": not failed, "counts": dict(counts), "failing": failed[:20]}
            if sum(counts.values()) % 50 == 0:
                yield "tests", row
        is_over = process.poll() is None and time.monotonic() >= deadline
        if is_over:
            process.kill()
    status = "out of time" if is_over else f"exit status {process.returncode}"
    is_right = is_over or process.returncode == 0
    yield "tests", {**row, "passed": is_right and not failed and bool(row), "ended": status}


def _read_lines(process: subprocess.Popen[str], deadline: float) -> Iterator[str]:
    """Yields the lines that a process prints, until it ends or the time is over."""
    assert process.stdout is not None
    lines: queue.Queue[str | None] = queue.Queue()

    def read(source: Iterable[str]) -> None:
        for line in source:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=max(deadline - time.monotonic(), 0))
        except queue.Empty:
            return
        if line is None:
            process.wait()
            return
        yield line


def check_lowered(target: Target) -> Iterator[tuple[str, Row]]:
    """Checks models in which all is computed by kernels that these can compute."""
    for name in list(MODELS)[: 1 if target.is_smoke else None]:
        workload = MODELS[name]()
        for dtype in (torch.float32, torch.bfloat16):
            model = build(workload, target.device, dtype)
            schedule = make_schedule(workload)
            calls = make_calls(workload, schedule.timesteps, target.device, dtype)
            plain = run(pabc.compile(model, schedule, backend="eager"), calls)
            for backend in dict.fromkeys(("eager", target.backend)):
                options = {"backend": backend, "kernels": "force"}
                row = check_compiled(workload, model, schedule, target, plain, **options)
                yield f"{name}, {str(dtype).removeprefix('torch.')}, {backend}", row


def time_kernel(kernel: str, target: Target) -> Iterator[tuple[str, Row]]:
    """Checks and times a kernel at published shapes; on a CPU, checks tiny ones."""
    benchmark = BENCHMARKS[kernel]
    shapes = benchmark.SHAPES if target.is_cuda else benchmark.SMOKE
    for name, sizes in shapes.items():
        try:
            yield name, benchmark.measure(name, sizes, target.device)
        except torch.OutOfMemoryError as error:
            yield name, {"error": f"OutOfMemoryError: {error}"[:160]}
        if target.is_cuda:
            torch.cuda.empty_cache()


def collect_gains(rows: Mapping[str, Row]) -> dict[str, Any]:
    """Returns, by kernel, the sizes that were timed and how many times as fast the kernel was."""
    found: dict[str, Any] = {}
    for name, row in rows.items():
        task, _, _ = name.partition(": ")
        if task.startswith(f"{TIMES} ") and "over_best" in row:
            kernel = task.removeprefix(f"{TIMES} ")
            found.setdefault(kernel, []).append([row["sizes"], round(row["over_best"], 3)])
    return found


def write_gains(folder: Path, device: str, rows: Mapping[str, Row]) -> None:
    """Writes the gains of a device to `gains.json` in a folder, if any kernel was timed."""
    if found := collect_gains(rows):
        report.write_json(folder / GAINS, {device: found})


def follow_gains(folder: Path) -> str:
    """Makes this process choose kernels by the gains in a folder; returns what it follows."""
    if not (folder / GAINS).is_file():
        return "of the package"
    gains.TABLE = folder / GAINS
    return "as just measured"


def record_gains(folder: Path) -> None:
    """Adds the gains in a folder to the table that `kernels="auto"` consults."""
    table: dict[str, Any] = json.loads(gains.TABLE.read_text())
    for device, kernels in json.loads((folder / GAINS).read_text()).items():
        table.setdefault(device, {}).update(kernels)
    gains.TABLE.write_text(json.dumps(table, indent=1) + "\n")
    print(f"added {folder / GAINS} to {gains.TABLE}")
