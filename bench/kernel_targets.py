"""What each kernel takes of GPUs that need not be at hand: registers, spills, shared memory.

    python bench/kernel_targets.py --out bench/results/kernel_targets.json

Every kernel in every configuration that is listed beside it is compiled for sm_80, sm_90, sm_100
and gfx942. Registers are those of a thread. What spills, or takes more than the target has, is
marked, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # in which nothing can be compiled

import report

from pabc.kernels import short_attention
from pabc.kernels.targets import TARGETS, compile_for

KERNELS = {"short_attention": short_attention}


def main() -> None:
    """Compiles all; prints a table, writes JSON where asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", default="", help="configurations whose label has this in it")
    add("--out", type=Path)
    options = parser.parse_args()
    rows, problems = [], 0
    for kernel, module in KERNELS.items():
        for what in module.specializations():
            if options.only not in what.label:
                continue
            row: dict[str, object] = {"kernel": kernel, "configuration": what.label}
            for target in TARGETS:
                usage = compile_for(target, what)
                row[target.name] = {
                    "registers": usage.registers,
                    "spilled": usage.spilled,
                    "shared": usage.shared,
                    "problems": list(usage.problems),
                }
                problems += bool(usage.problems)
            rows.append(row)
            print(format_row(row), flush=True)
    print(f"{len(rows)} configurations, {len(TARGETS)} targets, {problems} problems")
    if options.out is not None:
        report.write_json(options.out, {**report.describe_run(), "rows": rows})
    sys.exit(problems > 0)


def format_row(row: dict[str, object]) -> str:
    """A line: registers, spilled and shared bytes for each target."""
    cells = []
    for target in TARGETS:
        usage = row[target.name]
        assert isinstance(usage, dict)
        text = f"{usage['registers']} {usage['spilled']} {usage['shared']}"
        cells.append(f"{target.name} {text}{' !' * bool(usage['problems'])}")
    return f"{row['kernel']:16} {row['configuration']:36} " + "   ".join(cells)


if __name__ == "__main__":
    main()
