"""Predicts seconds of a generation on 1 to 64 ranks, without and with reuse.

    python bench/parallel.py --check --out bench/results/parallel.json
    python bench/parallel.py --size full --tflops 400 --out bench/results/parallel_full.json

A generation takes, summed over its steps,

    compute seconds of the step's phase on one rank x the rank's FLOPs / all FLOPs x crowding
    + collectives x latency + bytes sent / bandwidth + agreement of the ranks

FLOPs (including padding and work that every rank repeats), collectives and bytes are those of
`pabc.explain(ranks=...)`. Compute seconds of a step of each phase are measured on one rank, read
from a file (`--seconds`: JSON, schedule -> seconds of each), or FLOPs over `--tflops`. Latency and
bandwidth (bytes per second that a rank sends) are given, or measured between local ranks: the line
through the medians of all-to-alls of growing size. The defaults are assumptions for GPUs, not
measurements: 80 % of the 450 GB/s of NVLink 4 in each direction, 20 us per collective, 200 us for
the agreement.

`--check` measures one rank's phases, links, and generations in 1, 2 and 4 processes on this machine
(gloo, a thread each), and shows predictions beside them. These ranks share cores, caches and
memory. By how much that slows computing (crowding) is measured with as many processes that each
compute a generation of their own at once. All other seconds are marked as predictions: they assume
that each rank has a machine of its own, with the link measured between two ranks here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import report
import torch
from communication import example_call
from ranks import OPS, compile_for, generate, launch, make_schedules, together, work
from rows import Row, Rows, add_options
from scaling_model import Cost, Link, fit_link, predict
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from workloads import FULL, SMALL, TINY, Workload, build

import pabc
from pabc.runtime.peers import Peers

RANKS = (1, 2, 4, 8, 16, 32, 64)
CHECKED = (1, 2, 4)
SIZES = {"tiny": TINY, "small": SMALL, "full": FULL}
LATENCY, BANDWIDTH, AGREEMENT = 20e-6, 0.8 * 450e9, 200e-6
NUM_EXCHANGES = 20
NO_LINK = Link(0.0, math.inf)
APART = "each its own"
"""The name of a measurement: every rank at once runs a generation unsharded, without reuse."""


def main() -> None:
    """Measures and predicts as the options say; prints tables, writes the JSON."""
    options = parse_options()
    if options.worker is not None:
        work(options.worker, run_ranks)
        return
    names = ("model", "size", "steps", "backend", "rounds", "check", "tflops", "latency")
    settings = {name: getattr(options, name) for name in (*names, "bandwidth", "smoke")}
    rows = Rows(options.out, report.describe_run(), settings, options.resume)
    task = {
        name: getattr(options, name) for name in ("model", "size", "steps", "backend", "rounds")
    }
    if options.check:
        for ranks in CHECKED:
            rows.measure(f"measured, {ranks}", lambda n=ranks: launch(__file__, n, task))
    given = json.loads(options.seconds.read_text()) if options.seconds else None
    rows.write(**predict_all(options, rows, given))
    print_tables(options, rows)


def parse_options() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    add = parser.add_argument
    add("--model", choices=("latte", "opensora", "cogvideox"), default="latte")
    add(
        "--size", choices=tuple(SIZES), default="small", help="of the model and its latents (small)"
    )
    add("--steps", type=int, default=30)
    add("--backend", choices=("eager", "inductor"), default="eager")
    add("--rounds", type=int, default=3, help="measured generations of each variant (3)")
    add("--check", action="store_true", help="measures on 1, 2 and 4 ranks here")
    add("--seconds", type=Path, help="JSON: schedule -> seconds of each phase, on one rank")
    add(
        "--tflops",
        type=float,
        default=400.0,
        help="of one rank, without --check or --seconds (400)",
    )
    add("--latency", type=float, default=LATENCY, help="seconds of a collective (20e-6)")
    add("--bandwidth", type=float, default=BANDWIDTH, help="bytes a second (360e9)")
    add("--agreement", type=float, default=AGREEMENT, help="seconds a step (200e-6)")
    add("--ranks", type=lambda text: [int(n) for n in text.split(",")], default=list(RANKS))
    add("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smoke:
        options.size, options.rounds, options.steps = "tiny", 1, 6
    return options


def run_ranks(mesh: DeviceMesh, task: Any) -> Row:
    """Measures, in each process, seconds of generations, of phases' steps, and of collectives."""
    workload = SIZES[task["size"]][task["model"]]
    model, steps = build(workload), task["steps"]
    schedules = make_schedules(workload, steps)
    compiled = {name: compile_for(model, s, mesh, task["backend"]) for name, s in schedules.items()}
    compiled["no reuse"].schedule = schedules["2/4/6"]  # so that the same dimension is chosen
    for name, fast in compiled.items():
        fast(**example_call(workload))
        fast.reset()
        fast.schedule = schedules[name]
        generate(workload, fast, steps)
        assert fast.stats.captures == 1, fast.stats
    apart = pabc.compile(model, schedules["no reuse"], backend=task["backend"])
    generate(workload, apart, steps)
    variants = {**compiled, APART: apart}
    row: Row = {"ranks": mesh.size(), "seconds": {name: [] for name in variants}, "phases": {}}
    by_step: dict[str, list[list[float]]] = {name: [] for name in variants}
    for _, (name, fast) in itertools.product(range(task["rounds"]), variants.items()):
        clock = Clock()
        with together(mesh):
            generate(workload, fast, steps, clock)
        row["seconds"][name].append(sum(clock.seconds))
        by_step[name].append(clock.seconds)
    for name, fast in compiled.items():
        medians = [statistics.median(each) for each in zip(*by_step[name], strict=True)]
        row["phases"][name] = [
            statistics.median([medians[step] for step in phase.steps]) for phase in fast.plan.phases
        ]
    if mesh.size() > 1:
        row["exchanges"], row["agreement"] = time_exchanges(mesh), time_agreement(mesh)
    return row


class Clock:
    """A clock of the seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, index: int, timestep: Tensor) -> Clock:
        """Returns a context that times the step within it."""
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def time_exchanges(mesh: DeviceMesh) -> dict[str, float]:
    """Returns bytes that a rank sends in an all-to-all -> median seconds of one."""
    size, group = mesh.size(), mesh.get_group()
    found = {}
    for rows in (1, 2**10, 2**14, 2**16, 2**18):
        x = torch.zeros(size, rows)
        seconds = []
        for _ in range(NUM_EXCHANGES):
            with together(mesh):
                start = time.perf_counter()
                ones = [1] * size
                sent = OPS.all_to_all_single(x, ones, ones, group.group_name)
                OPS.wait_tensor(sent)
                seconds.append(time.perf_counter() - start)
        found[str(x.nbytes * (size - 1) // size)] = statistics.median(seconds)
    return found


def time_agreement(mesh: DeviceMesh) -> float:
    """Returns the median seconds of the ranks' agreement check."""
    peers, seconds = Peers(mesh), []
    for step in range(NUM_EXCHANGES):
        with together(mesh):
            start = time.perf_counter()
            peers.exchange({"step": str(step)})
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def predict_all(
    options: argparse.Namespace, rows: Rows, given: Mapping[str, Sequence[float]] | None
) -> dict[str, Any]:
    """Returns seconds by schedule and ranks: `predictions`, and `expected` ones, for here."""
    workload = SIZES[options.size][options.model]
    counts = [*options.ranks, *(CHECKED if options.check else ())]
    costs = find_costs(workload, options.steps, [1, *counts])
    link = Link(options.latency, options.bandwidth, options.agreement)
    found: dict[str, Any] = {"predictions": {}, "expected": {}}
    for name, alone in costs[1].items():
        seconds = [n / (options.tflops * 1e12) for n in alone.flops]
        if options.check:
            seconds = rows.rows["measured, 1"]["phases"][name]
            link = find_link(rows, 2)
            found["expected"][name] = {
                str(n): predict(
                    seconds, alone, costs[n][name], find_link(rows, n), find_crowding(rows, n)
                )
                for n in CHECKED
            }
        elif given is not None:
            seconds = given[name]
        found["predictions"][name] = {
            str(n): predict(seconds, alone, costs[n][name], link if n > 1 else NO_LINK)
            for n in options.ranks
        }
    return found


def find_crowding(rows: Rows, ranks: int) -> float:
    """Returns the factor by which a generation is slower while others run on this machine."""
    crowded, free = (
        statistics.median(rows.rows[f"measured, {n}"]["seconds"][APART]) for n in (ranks, 1)
    )
    return crowded / free


def find_link(rows: Rows, ranks: int) -> Link:
    """Returns the link as measured between this number of ranks on this machine."""
    row = rows.rows[f"measured, {ranks}"]
    if ranks == 1:
        return NO_LINK
    times = {int(nbytes): seconds for nbytes, seconds in row["exchanges"].items()}
    return fit_link(times, row["agreement"])


def find_costs(workload: Workload, steps: int, ranks: Sequence[int]) -> dict[int, dict[str, Cost]]:
    """Returns the cost of a rank under each schedule, among `ranks`, sharded as for the preset."""
    is_full = workload is FULL.get(workload.name)
    dtype = torch.bfloat16 if is_full else torch.float32
    model, call = build(workload, "meta", dtype), example_call(workload, "meta", dtype)
    schedules = make_schedules(workload, steps)
    preset = schedules["2/4/6"]
    found = {
        count: pabc.explain(model, **call, schedule=preset, ranks=count)
        for count in dict.fromkeys(ranks)
    }
    return {n: {name: Cost.of(e, s) for name, s in schedules.items()} for n, e in found.items()}


def print_tables(options: argparse.Namespace, rows: Rows) -> None:
    """Prints predictions and measurements."""
    predictions = rows.content["predictions"]
    base = next(iter(predictions["no reuse"].values()))
    lines = [
        [ranks, *(f"{predictions[name][str(ranks)]:.3f}" for name in predictions)]
        + [f"{base / predictions[name][str(ranks)]:.2f}x" for name in predictions]
        for ranks in options.ranks
    ]
    print(f"predicted seconds of a generation, {options.model} ({options.size}):")
    first = f"over {options.ranks[0]} without"
    header = ["ranks", *predictions, *(f"{name}: {first}" for name in predictions)]
    print(report.format_table(header, lines))
    if not options.check:
        return
    lines = []
    for ranks, name in itertools.product(CHECKED, predictions):
        seconds = rows.rows[f"measured, {ranks}"]["seconds"][name]
        expected = rows.content["expected"][name][str(ranks)]
        median = statistics.median(seconds)
        spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
        lines.append([ranks, name, f"{expected:.3f}", f"{median:.3f}", spread])
        lines[-1].append(f"{expected / median:.2f}")
    crowding = ", ".join(f"{n} ranks {find_crowding(rows, n):.2f}" for n in CHECKED[1:])
    print(f"\nchecked on {os.cpu_count()} cores, a thread a rank; crowding: {crowding}")
    header = ["ranks", "schedule", "predicted", "measured", "from, to", "predicted / measured"]
    print(report.format_table(header, lines))


if __name__ == "__main__":
    main()
