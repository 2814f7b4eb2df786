"""Runs all checks and benchmarks that need a GPU, in three parts of a few minutes each.

    python bench/gpu.py --part checks --out bench/results/gpu
    python bench/gpu.py --part times --out bench/results/gpu
    python bench/gpu.py --part train --out bench/results/gpu

Nothing of it has run on a GPU yet: it was written and tested on a CPU alone, where
`--device cpu --smoke` takes its paths with tiny models.

- `checks`: tiny Latte, CogVideoX and Wan models in float32 and bfloat16 (`eager` without reuse has
  the model's bits; with reuse, the oracle's; Inductor's error against float64 is at most twice that
  of `eager`); kernels, alone and in models; CUDA graphs; calls that are skipped; plans that make
  themselves; the timestep guard; slots as bf16, fp8 or in host memory, with their bytes; `save` and
  `load`; the first step of models of published size. Several tasks run at a time.
- `times`: kernels against PyTorch's ops, Inductor and a copy; whole loops at published sizes in
  bf16: eager, pabc with nothing reused, a pyramid, skips and a plan of `pabc.auto`, torch.compile;
  the peak of allocated bytes. A variant is timed only if its first step agrees with the model's.
  What `checks` compiled is found in the caches, if it ran before on the same machine.
- `train`: the emoji model at its full size, and its accuracy.

Each task is a process of its own, with a limit of its time. Rows are written at once, to
`PART.json`; what the tasks print is in `PART.log`. `--resume` runs the tasks that are not done, or
failed; `--earlier FOLDER` takes what an earlier run wrote to another folder. `--record FOLDER` adds
the gains of kernels found there to the table that `kernels="auto"` consults. The exit status is 1
if a check failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import gpu_kernels
import report
import torch
from gpu_checks import Target
from gpu_loops import format_times
from gpu_parts import PARTS
from gpu_processes import DONE, has_failed, is_complete, run_tasks
from rows import Row, Rows, add_options

CORES_PER_JOB = 4
SMOKE_PATIENCE = 20.0


def main() -> None:
    """Runs the tasks that the options name while there is time; prints and writes rows."""
    begin = time.monotonic()
    options = parse_options()
    if options.record is not None:
        gpu_kernels.record_gains(options.record)
        return
    target = Target(
        device=options.device,
        is_smoke=options.smoke,
        backend=options.backend,
        steps=options.steps,
        rounds=options.rounds,
        folder=options.out,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    if options.earlier is not None:
        take_earlier(options.earlier, options.out, options.part)
    status = run_part(options, target, begin + options.budget_seconds)
    sys.exit(status)


def run_part(options: argparse.Namespace, target: Target, deadline: float) -> bool:
    """Runs a part until the deadline; returns True if a check failed."""
    out, part = options.out, options.part
    gpu = describe_gpu(target.device)
    facts = {**report.describe_run(target.device), "part": part, "gpu": gpu}
    is_kept = options.resume or options.earlier is not None
    rows = Rows(out / f"{part}.json", facts, target.settings, is_kept, is_same_commit=False)
    tasks = [
        replace(task, seconds=task.seconds * find_patience(options))
        for task in PARTS[part].tasks
        if task.name in options.only and not is_complete(task, rows)
    ]
    # Inductor would start as many processes for each job.
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))

    def write_gains() -> None:
        if gpu is not None:
            gpu_kernels.write_gains(out, gpu["name"], rows.rows)

    log = out / f"{part}.log"
    run_tasks(tasks, target, rows, deadline, log, jobs=options.jobs, after_each=write_gains)
    return summarize(rows, out / f"{part}.json")


def parse_options() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, "folder")
    parser.set_defaults(out=Path("bench/results/gpu"))
    add = parser.add_argument
    add("--part", choices=tuple(PARTS), help="what to run")
    add("--record", type=Path, metavar="FOLDER", help="only add the gains in this folder")
    add("--device", default="cuda")
    add("--budget-seconds", type=float, help="of the whole part; default: its own")
    add("--jobs", type=int, help="tasks at a time; default: the part's own, as there are cores")
    add("--only", type=lambda text: text.split(";"), help="some tasks, with ; between them")
    add("--earlier", type=Path, metavar="FOLDER", help="keep the rows that a run wrote there")
    add("--backend", choices=("inductor", "eager"), default="inductor", help="eager: to try it")
    add("--steps", type=int, help="steps of timed generations; default 12")
    add("--rounds", type=int, help="timed generations of each variant; default 2")
    options = parser.parse_args()
    if options.record is None:
        complete(parser, options)
    return options


def complete(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Sets what was not given, and refuses what is wrong."""
    if options.part is None:
        parser.error(f"--part: expected {', '.join(PARTS)}, found none")
    part = PARTS[options.part]
    options.steps = options.steps or (8 if options.smoke else 12)
    options.rounds = options.rounds or (1 if options.smoke else 2)
    options.budget_seconds = options.budget_seconds or part.seconds * find_patience(options)
    options.jobs = options.jobs or max(1, min(part.jobs, (os.cpu_count() or 1) // CORES_PER_JOB))
    names = [task.name for task in part.tasks]
    options.only = [name.strip() for name in options.only or names]
    if unknown := set(options.only) - set(names):
        parser.error(f"--only: expected some of {'; '.join(names)}, found {'; '.join(unknown)}")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device: expected cpu, as PyTorch finds no GPU, found {options.device}")


def find_patience(options: argparse.Namespace) -> float:
    """Returns a factor of all limits of time, which are those of a GPU."""
    return SMOKE_PATIENCE if options.smoke else 1.0


def take_earlier(folder: Path, out: Path, part: str) -> None:
    """Copies what an earlier run wrote: rows, gains and the checkpoint."""
    if folder.resolve() == out.resolve():
        return
    patterns = [f"{part}.json", gpu_kernels.GAINS]
    patterns += ["checkpoint.pt*"] * (part == "train")
    for pattern in patterns:
        for path in folder.glob(pattern):
            shutil.copy(path, out)


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


def summarize(rows: Rows, path: Path) -> bool:
    """Prints the times, what failed, and what was not done; returns True if a check failed."""
    if any("variants" in row for row in rows.rows.values()):
        print(f"\n{format_times(rows.rows)}")
    failed = [name for name, row in rows.rows.items() if has_failed(row)]
    left = [name for name, row in rows.rows.items() if row.get("outcome", DONE) != DONE]
    for what, names in (("not done", left), ("failed", failed)):
        print(f"{len(names)} {what}{': ' * bool(names)}{'; '.join(names)}")
    print(f"wrote {path}")
    return bool(failed)


if __name__ == "__main__":
    main()
