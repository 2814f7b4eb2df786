"""Measures seconds until a model is compiled and has returned its first result: cold and warm.

    python bench/compile_time.py --out bench/results/compile_time.json

The model is diffusers' Latte with n spatial and n temporal blocks, n = 4, 12, 28, random weights.
Variants:

- eager: the model as it is; one step, for the time that is not compilation;
- pabc: `pabc.compile` with a pyramid of 30 steps, 2/4/6 over the middle 70 %; `prepare`, which
  captures the model and compiles every phase of that plan; then the first step;
- torch.compile: the whole model as one graph, `fullgraph=True`; one step;
- regional: each transformer block compiled by itself, by diffusers' `compile_repeated_blocks`
  if the model declares its repeated blocks, else by `block.compile`, both with `fullgraph=True`;
  one step. PyTorch reuses the code of a block for equal blocks.

Each row is a process of its own. Cold: an empty Inductor cache on disk; warm: the same again, with
the cache that the cold row left. `seconds` (wall clock) and `cpu` (all threads and child processes,
compilers included) begin before the call that compiles and end with the first result. They do not
include imports of torch, diffusers and pabc, and building the model (`imports`), but what PyTorch
imports only when it compiles. Of pabc's seconds, `capture` is the part of the capture, the passes,
the first step and lookups; the rest specializes and compiles. `codes` is the number of compilation
units: pabc's distinct blocks, the others' graphs. `ratio` is over torch.compile's median of the
same depth, cold over cold and warm over warm.

On a busy machine, `cpu` is more reliable than `seconds`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import report
from rows import Row, Rows, add_options

DEPTHS = (4, 12, 28)
NUM_STEPS = 30
STATES = ("cold", "warm")


def main() -> None:
    """Measures the rows that the options name; prints a table, writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    add = parser.add_argument
    add("--depths", type=lambda text: [int(n) for n in text.split(",")], default=list(DEPTHS))
    add("--variants", type=lambda text: text.split(","), default=list(VARIANTS))
    add("--width", type=int, default=128, help="width of the model, which has 4 heads")
    add("--rounds", type=int, default=3, help="measurements of each row")
    add("--limit", type=float, default=1200, help="seconds after which a row is stopped")
    add("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        variant, depth, width = json.loads(options.row)
        print(json.dumps(measure(variant, depth, width)))
        return
    if unknown := set(options.variants) - set(VARIANTS):
        expected = ", ".join(VARIANTS)
        parser.error(f"--variants: expected some of {expected}, found {', '.join(unknown)}")
    if options.smoke:
        options.depths, options.width, options.rounds = [1], 16, 1
    names = ("depths", "variants", "width", "rounds")
    settings = {name: getattr(options, name) for name in names}
    rows = Rows(options.out, report.describe_run(), settings, options.resume)
    measure_all(rows, options)
    summary = summarize(rows.rows)
    rows.write(summary=summary)
    print(format_rows(summary))


def measure_all(rows: Rows, options: argparse.Namespace) -> None:
    """Measures the variants in turn, round after round; a row is a cold and a warm start."""
    for i, depth in itertools.product(range(options.rounds), options.depths):
        for variant in options.variants:
            measured = partial(run_pair, variant, depth, options.width, options.limit)
            rows.measure(f"round {i}, depth {depth}, {variant}", measured)


def run_pair(variant: str, depth: int, width: int, limit: float) -> Row:
    """Measures a cold and a warm start, each in a process of its own."""
    about = {"variant": variant, "depth": depth, "shapes": _make(depth, width).shapes}
    with tempfile.TemporaryDirectory() as cache:
        return {**about, **{state: run(variant, depth, width, cache, limit) for state in STATES}}


def run(variant: str, depth: int, width: int, cache: str, limit: float) -> Row:
    """Returns a start measured in a process with `cache` as Inductor's folder, or an error."""
    command = [sys.executable, __file__, "--row", json.dumps([variant, depth, width])]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"error": f"more than {limit:.0f} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def measure(variant: str, depth: int, width: int) -> Row:
    """Measures a start in this process."""
    import torch
    from workloads import build, draw

    begin = cpu_seconds()
    workload = _make(depth, width)
    model, start = build(workload), draw(workload, 0)
    latents = torch.cat([start.latents] * 2)
    call = workload.call(
        latents, torch.full((len(latents),), _first_step(depth, width)), start.text
    )
    imports = time.perf_counter() - _START
    clock, cpu = time.perf_counter(), cpu_seconds()
    with torch.no_grad():
        describe = VARIANTS[variant](model, call, depth, width)
    found = {"seconds": time.perf_counter() - clock, "cpu": cpu_seconds() - cpu}
    return {
        **{name: round(value, 2) for name, value in found.items()},
        "imports": round(imports, 2),
        "imports_cpu": round(begin, 2),
        **describe(),
    }


_START = time.perf_counter()
Facts = Callable[[], Row]
"""A function that returns further entries of a row, called after the time is taken."""


def _make(depth: int, width: int) -> Any:
    from latte import make_latte

    return make_latte(depth=depth, width=width)


def _first_step(depth: int, width: int) -> float:
    import workloads

    return workloads.timesteps(_make(depth, width), NUM_STEPS)[0]


def start_eager(model: Any, call: dict[str, Any], depth: int, width: int) -> Facts:
    """Runs a step of the model as it is."""
    model(**call)
    return dict


def start_pabc(model: Any, call: dict[str, Any], depth: int, width: int) -> Facts:
    """Compiles all phases, then runs the first step."""
    from latte import make_schedule

    import pabc

    begin = time.perf_counter()
    fast = pabc.compile(model, make_schedule(_make(depth, width), NUM_STEPS))
    fast.prepare(**call)
    fast(**call)
    seconds = time.perf_counter() - begin

    def describe() -> Row:
        found, stats = fast.explain(), fast.stats
        return {
            "capture": round(seconds - found.compile_seconds, 2),
            "phases": len(fast.plan.phases),
            "codes": count_blocks(fast),
            "captures": stats.captures,
        }

    return describe


def count_blocks(fast: Any) -> int:
    """Returns the number of distinct blocks; with `backend="eager"`, of phases."""
    return int(fast.stats.blocks or fast.stats.compiles)


def start_torch(model: Any, call: dict[str, Any], depth: int, width: int) -> Facts:
    """Compiles the whole model as one graph, and runs a step."""
    import torch

    torch.compile(model, fullgraph=True)(**call)
    return count_graphs


def start_regional(model: Any, call: dict[str, Any], depth: int, width: int) -> Facts:
    """Compiles each block by itself, and runs a step."""
    import torch

    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(fullgraph=True)
    else:
        lists = [child for child in model.children() if isinstance(child, torch.nn.ModuleList)]
        for block in itertools.chain.from_iterable(lists):
            block.compile(fullgraph=True)
    model(**call)
    return count_graphs


def count_graphs() -> Row:
    """Returns the number of compiled graphs."""
    from torch._dynamo.utils import counters

    return {"codes": counters["stats"]["unique_graphs"]}


VARIANTS: dict[str, Callable[[Any, dict[str, Any], int, int], Facts]] = {
    "eager": start_eager,
    "pabc": start_pabc,
    "torch.compile": start_torch,
    "regional": start_regional,
}


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and of all processes that it started.

    Inductor compiles in worker processes that are not waited for, which `getrusage` misses. Running
    ones are looked up in /proc, where each counts the children that it waited for.
    """
    used: dict[int, float] = {}
    parents: dict[int, int] = {}
    tick = os.sysconf("SC_CLK_TCK")
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:  # the process has ended
            continue
        number = int(file.parent.name)
        parents[number] = int(fields[1])
        used[number] = sum(map(int, fields[11:15])) / tick
    return sum(seconds for number, seconds in used.items() if _is_ours(number, parents))


def _is_ours(number: int, parents: dict[int, int]) -> bool:
    while number in parents:
        if number == os.getpid():
            return True
        number = parents[number]
    return False


def summarize(rows: dict[str, Row]) -> list[Row]:
    """Returns medians, spreads and ratios to torch.compile by depth, variant and state."""
    groups: dict[tuple[int, str, str], list[Row]] = {}
    for row in rows.values():
        for state in STATES:
            groups.setdefault((row["depth"], row["variant"], state), []).append(row[state])
    made = [_summarize(*key, found) for key, found in groups.items()]
    made.sort(key=lambda row: (STATES.index(row["state"]), row["depth"]))
    for row in made:
        for name in ("seconds", "cpu"):
            base = next((r for r in made if _is_base(r, row)), {}).get(name)
            if base is not None and name in row:
                row[f"{name}_ratio"] = round(row[name]["median"] / base["median"], 3)
    return made


def _is_base(row: Row, other: Row) -> bool:
    return row["variant"] == "torch.compile" and all(
        row[name] == other[name] for name in ("depth", "state")
    )


def _summarize(depth: int, variant: str, state: str, found: list[Row]) -> Row:
    row: Row = {"depth": depth, "variant": variant, "state": state}
    good = [each for each in found if "error" not in each]
    if not good:
        return {**row, "error": found[0]["error"]}
    for name in ("seconds", "cpu", "capture"):
        if name in good[0]:
            row[name] = report.summarize([each[name] for each in good], 2)
    return {**row, **{name: good[0][name] for name in ("phases", "codes") if name in good[0]}}


def format_rows(summary: list[Row]) -> str:
    """Returns the table."""
    header = ("start", "seconds (min to max)", "ratio", "cpu seconds", "ratio", "capture")
    lines = [
        [
            f"{row['state']}, {row['depth']}+{row['depth']} blocks, {row['variant']}",
            report.format_spread(row["seconds"], 1) if "seconds" in row else row["error"],
            row.get("seconds_ratio"),
            report.format_spread(row["cpu"], 1) if "cpu" in row else None,
            row.get("cpu_ratio"),
            row["capture"]["median"] if "capture" in row else None,
            row.get("phases"),
            row.get("codes"),
        ]
        for row in summary
    ]
    return report.format_table([*header, "phases", "codes"], lines)


if __name__ == "__main__":
    main()
