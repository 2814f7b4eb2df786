"""Runs all checks and benchmarks that need a GPU in less than ten minutes; writes rows at once.

    python bench/gpu.py --out bench/results/gpu

Nothing of it has run on a GPU yet: it was written and tested on a CPU alone, where
`--device cpu --smoke` takes its paths with tiny models. In order:

- correctness of tiny Latte, CogVideoX and Wan models in float32 and bfloat16: `eager` without reuse
  has the model's bits; `eager` with reuse has the oracle's; Inductor's error against float64 is at
  most twice that of `eager`;
- the timestep guard, which on a GPU raises one call late; slots as bf16, fp8 or in host memory,
  against the same on the CPU; bytes as predicted, counted, and allocated; `save` and `load`;
- CUDA graphs; whole calls, stacks and blocks that are forecast: bits, errors, fresh results, CUDA
  graphs, times; kernels: their tests, then their times;
- end to end, published sizes in bf16: eager, pabc and torch.compile in turn, with seconds for each
  phase of the plan and the peak of allocated bytes. A variant is timed only if its first step
  agrees with the model's;
- memory at the published size, for each way to keep slots.

Each part is a process of its own, so that neither its memory nor a crash affects other parts. A
part that exceeds its time is stopped, and the rows that it wrote stay; `--resume` runs the parts
that are not done. The output of parts is in `gpu.log` beside `gpu.json`. The exit status is 1 if a
check failed.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import gpu_checks
import gpu_skips
import gpu_timing
import report
import torch
from case import first_line
from gpu_checks import Target
from rows import Row, Rows, add_options

Part = Callable[[Target], Iterator[tuple[str, Row]]]
LEAST = 5.0
"""A part starts only if at least this many seconds are left."""

PARTS: dict[str, Part] = {
    **{
        f"correctness: {name}": functools.partial(gpu_checks.check_model, name)
        for name in gpu_checks.MODELS
    },
    "timestep guard": gpu_checks.check_guard,
    "memory options": gpu_checks.check_memory,
    "artifact": gpu_checks.check_artifact,
    "CUDA graphs": gpu_timing.time_graphs,
    "skips": gpu_skips.check_skips,
    "skips: results": gpu_skips.check_results,
    "skips: CUDA graphs": gpu_skips.check_graphs,
    "skips: time": gpu_skips.time_skips,
    "kernels": gpu_timing.run_kernels,
    "end to end: latte": functools.partial(gpu_timing.time_loops, "latte"),
    "end to end: opensora": functools.partial(gpu_timing.time_loops, "opensora"),
    "memory: latte": gpu_timing.measure_memory,
}
"""The parts, in the order in which they run."""


def main() -> None:
    """Runs the parts that the options name while there is time; prints and writes rows."""
    begin = time.monotonic()
    options = parse_options()
    deadline = begin + options.budget_seconds
    target = Target(
        device=options.device,
        is_smoke=options.smoke,
        backend=options.backend,
        steps=options.steps,
        rounds=options.rounds,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    facts = {**report.describe_run(options.device), "gpu": describe_gpu(options.device)}
    rows = Rows(options.out / "gpu.json", facts, asdict(target), options.resume)
    names = [name for name in options.only if rows.rows.get(name, {}).get("outcome") != "done"]
    run_parts(names, target, rows, deadline, options.out / "gpu.log")
    print(f"\n{format_times(rows.rows)}")
    failed = [name for name, row in rows.rows.items() if has_failed(row)]
    print(f"\nwrote {options.out / 'gpu.json'}; {len(failed)} failed{': ' * bool(failed)}", end="")
    print("; ".join(failed))
    sys.exit(bool(failed))


def parse_options() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, "folder")
    parser.set_defaults(out=Path("bench/results/gpu"))
    add = parser.add_argument
    add("--device", default="cuda")
    add("--budget-seconds", type=float, default=570, help="of the whole run; default 570")
    add("--only", type=lambda text: text.split(";"), help=f"some of {'; '.join(PARTS)}")
    add(
        "--backend",
        choices=("inductor", "eager"),
        default="inductor",
        help="eager: to try the script",
    )
    add("--steps", type=int, help="steps of timed generations; default 12")
    add("--rounds", type=int, help="timed generations of each variant; default 3")
    options = parser.parse_args()
    options.steps = options.steps or (7 if options.smoke else 12)
    options.rounds = options.rounds or (1 if options.smoke else 3)
    options.only = [name.strip() for name in options.only or PARTS]
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"--only: expected some of {'; '.join(PARTS)}, found {'; '.join(unknown)}")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device: expected cpu, as PyTorch finds no GPU, found {options.device}")
    return options


def describe_gpu(device: str) -> Row | None:
    """Returns the properties of the GPU; None on a CPU."""
    if torch.device(device).type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "bytes": found.total_memory,
        "processors": found.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def has_failed(row: Row) -> bool:
    """Returns True if a row has a failed check or an error."""
    return "error" in row or row.get("passed") is False


class Process:
    """A part in a process of its own, which imports its modules and then waits to be begun.

    The process is spawned, not forked: CUDA cannot be used after a fork.
    """

    def __init__(self, name: str, target: Target, log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, name, target, log))
        self._process.start()
        theirs.close()

    def run(self, rows: Rows, deadline: float) -> str:
        """Runs the part, adding its rows as they arrive; returns a summary."""
        try:
            self._pipe.send("begin")
            while self._pipe.poll(max(deadline - time.monotonic(), 0)):
                message = self._pipe.recv()
                if message is None:
                    return "done"
                key, row = message
                rows.add(f"{self.name}: {key}", row)
                print(format_row(f"{self.name}: {key}", row), flush=True)
            return "stopped: no time left"
        except (EOFError, OSError):
            self._process.join(10)
            return f"died: exit code {self._process.exitcode}"

    def end(self, seconds: float = 0) -> None:
        """Ends the process, after waiting a while for it to end by itself."""
        self._process.join(seconds)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._pipe.close()


def run_parts(names: list[str], target: Target, rows: Rows, deadline: float, log: Path) -> None:
    """Runs the parts in turn; the process of each starts while the one before it runs."""
    following: Process | None = None
    for i, name in enumerate(names):
        for each in [each for each in rows.rows if each.startswith(f"{name}: ")]:
            del rows.rows[each]  # rows of a part that was stopped
        begin = time.monotonic()
        outcome = "not begun: no time left"
        if deadline - begin > LEAST:
            process = following or Process(name, target, log)
            following = Process(names[i + 1], target, log) if i + 1 < len(names) else None
            outcome = process.run(rows, deadline)
            process.end(10 if outcome == "done" else 0)
        row: Row = {"outcome": outcome, "seconds": round(time.monotonic() - begin, 1)}
        if outcome.startswith("died"):
            row["error"] = outcome
        rows.add(name, row)
        print(format_row(name, row), flush=True)
    if following is not None:
        following.end()


def serve(pipe: Connection, name: str, target: Target, log: Path) -> None:
    """Runs a part in its process: waits to be begun, sends its rows, then None."""
    with log.open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    try:
        pipe.recv()
    except EOFError:
        return
    print(f"== {name}", flush=True)
    try:
        for row in PARTS[name](target):
            pipe.send(row)
    except Exception as error:
        traceback.print_exc()
        pipe.send(("failed", {"error": first_line(error)}))
    pipe.send(None)


def format_row(name: str, row: Row) -> str:
    """Returns a row as a line of text."""
    if "error" in row:
        return f"{name}: FAILED: {row['error']}"
    parts = [f"{key} {_format(value)}" for key, value in row.items() if key != "passed"]
    verdict = {True: "passed", False: "FAILED", None: ""}[row.get("passed")]
    return f"{name}: {', '.join(filter(None, [verdict, *parts]))}"


def format_times(rows: dict[str, Row]) -> str:
    """Returns the table of timed variants."""
    header = ("variant", "s a generation (min to max)", "ms a step", "speedup", "peak GiB")
    lines = []
    for name, row in rows.items():
        for variant, found in row.get("variants", {}).items():
            peak = found["peak_bytes"]
            cells = [
                f"{name.rpartition(':')[0]}: {variant}",
                report.format_spread(found["seconds"]),
            ]
            cells += [
                f"{1e3 * found['step_seconds']['median']:.1f}",
                f"{row['speedup'][variant]:.2f}",
            ]
            lines.append([*cells, None if peak is None else f"{peak / 2**30:.2f}"])
    return report.format_table(header, lines)


def _format(value: Any) -> str:
    if isinstance(value, dict) and set(value) == {"median", "min", "max"}:
        return report.format_spread(value, 4)
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_format(each)}" for key, each in value.items()) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
