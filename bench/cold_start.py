"""Measures seconds from the start of a process to its first result: compiled, and loaded.

    python bench/cold_start.py --out bench/results/cold_start.json

Each row is a process of its own with the demo's model (2.96 M parameters, random weights) and a
pyramid of 20 steps, which has five phases:

- compiled, empty cache: `pabc.compile` with an empty Inductor cache on disk, and then `save`;
- compiled, full cache: the same with the Inductor cache that the first row left;
- loaded: `pabc.load` of the file that the first row saved, with an empty Inductor cache.

`first` is the time from the start of the process to the result of the first step, `generation` to
that of the last step; `imports` is the part of both that imports and building the model take.
`compile` is how much longer this generation took than the next one, which compiles nothing. `load`
and `save` are the seconds of these calls. `cpu` is the CPU time of `generation`, compilers
included, and `save_cpu` that of `save`; both are less sensitive to other processes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import report

NUM_STEPS = 20


def measure(artifact: str, how: str, start: float) -> dict[str, float]:
    """Returns a row, measured in this process, which began at `start`."""
    import torch

    import pabc
    from pabc.demo.run import example

    model, (latents, any_step, text), kwargs = example()
    timesteps = [torch.full_like(any_step, t) for t in range(1000, 0, -1000 // NUM_STEPS)]
    row = {"imports": time.time() - start}
    begin = time.time()
    if how == "loaded":
        fast = pabc.load(artifact, model)
        row["load"] = time.time() - begin
    else:
        schedule = pabc.Schedule.pyramid(
            [int(t[0]) for t in timesteps], spatial=2, temporal=4, cross=6, fraction=(0.15, 0.85)
        )
        fast = pabc.compile(model, schedule)
    with torch.no_grad():
        fast(latents, timesteps[0], text, **kwargs)
        row["first"] = time.time() - start
        for timestep in timesteps[1:]:
            fast(latents, timestep, text, **kwargs)
        end = time.time()
        row |= {"generation": end - start, "cpu": cpu_seconds()}
        for timestep in timesteps:
            fast(latents, timestep, text, **kwargs)
    assert not fast.stats.fallbacks, fast.stats
    if how != "loaded":
        row["compile"] = (end - begin) - (time.time() - end)
        begin, cpu = time.time(), cpu_seconds()
        fast.save(artifact)
        row |= {"save": time.time() - begin, "save_cpu": cpu_seconds() - cpu}
    stats = fast.stats
    return {**row, "captures": stats.captures, "compiles": stats.compiles}


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and of the child processes that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def run(artifact: Path, how: str, cache: Path) -> dict[str, float]:
    """Returns a row, measured in a process of its own."""
    command = [sys.executable, __file__, "--row", str(artifact), how, repr(time.time())]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return row


def main() -> None:
    """Measures the rows, prints them and writes them to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/cold_start.json"))
    parser.add_argument("--repeats", type=int, default=3, help="repetitions of all rows")
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        artifact, how, start = options.row
        print(json.dumps(measure(artifact, how, float(start))))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_all(Path(folder), options.repeats)
    content: dict[str, Any] = {
        **report.describe_run(),
        "steps": NUM_STEPS,
        "seconds": rows,
    }
    report.write_json(options.out, content)
    print(json.dumps(content, indent=1))


def measure_all(folder: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Measures all rows; returns the medians of each."""
    found: dict[str, list[dict[str, float]]] = {}
    for i in range(repeats):
        artifact, cache = folder / f"fast{i}.pabc", folder / f"cache{i}"
        for name, how, path, used in (
            ("compiled, empty cache", "compiled", artifact, cache),
            ("compiled, full cache", "compiled", folder / "again.pabc", cache),
            ("loaded", "loaded", artifact, folder / f"other{i}"),
        ):
            found.setdefault(name, []).append(run(path, how, used))
        found["loaded"][-1]["mebibytes"] = artifact.stat().st_size / 2**20
    return {how: median(rows) for how, rows in found.items()}


def median(rows: list[dict[str, float]]) -> dict[str, float]:
    """Returns the median of each number."""
    return {name: round(statistics.median(r[name] for r in rows), 2) for name in rows[0]}


if __name__ == "__main__":
    main()
