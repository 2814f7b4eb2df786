"""Resources that kernels use on GPUs that are not at hand: registers, spills, shared memory.

    python bench/kernel_targets.py --out bench/results/kernel_targets.json

Every kernel is compiled for sm_80, sm_90, sm_100 and gfx942 in every configuration that
`pabc.kernels.targets` lists. Registers are those of a thread. A configuration that spills, or that
exceeds the target's limits, is marked, and the exit status is then 1.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # in which nothing can be compiled

import report

from pabc.kernels.compilation import compile_for
from pabc.kernels.gpus import TARGETS
from pabc.kernels.targets import SPECIALIZATIONS


def main() -> None:
    """Compiles all, prints a table, and writes JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--kernel", help="one kernel; default: all")
    add("--only", default="", help="configurations whose label has this in it")
    add("--target", choices=[target.name for target in TARGETS], help="one target; default: all")
    add("--workers", type=int, default=2, help="processes; default: %(default)s")
    add("--out", type=Path)
    options = parser.parse_args()
    work = [
        (kernel, index)
        for kernel, find in SPECIALIZATIONS.items()
        for index, what in enumerate(find())
        if options.kernel in (None, kernel) and options.only in what.label
    ]
    rows, problems = [], 0
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=spawn) as pool:
        compile_one = partial(compile_for_all, only=options.target)
        for row in pool.map(compile_one, *zip(*work, strict=True)):
            rows.append(row)
            problems += sum(bool(row[t.name]["problems"]) for t in TARGETS if t.name in row)
            print(format_row(row), flush=True)
    num_targets = len(TARGETS) if options.target is None else 1
    print(f"{len(rows)} configurations, {num_targets} targets, {problems} problems")
    if options.out is not None:
        report.write_json(options.out, {**report.describe_run(), "rows": rows})
    sys.exit(problems > 0)


def compile_for_all(kernel: str, index: int, *, only: str | None = None) -> dict[str, Any]:
    """Returns the row of one configuration of a kernel, for all targets or `only` one."""
    what = list(SPECIALIZATIONS[kernel]())[index]
    row: dict[str, Any] = {"kernel": kernel, "configuration": what.label}
    for target in TARGETS:
        if only not in (None, target.name) or (what.targets and target.name not in what.targets):
            continue
        usage = compile_for(target, what)
        row[target.name] = {
            "registers": usage.registers,
            "spilled": usage.spilled,
            "shared": usage.shared,
            "problems": list(usage.problems),
        }
    return row


def format_row(row: dict[str, Any]) -> str:
    """Returns a line of registers, spilled bytes and shared bytes for each of its targets."""
    cells = []
    for target in TARGETS:
        if target.name not in row:
            continue
        usage = row[target.name]
        text = f"{usage['registers']} {usage['spilled']} {usage['shared']}"
        cells.append(f"{target.name} {text}{' !' * bool(usage['problems'])}")
    return f"{row['kernel']:16} {row['configuration']:36} " + "   ".join(cells)


if __name__ == "__main__":
    main()
