"""Compares ways to sample with less work, on both demo models: quality by work, and by seconds.

    python bench/pareto.py --out bench/results/pareto.json --resume
    python bench/pareto.py --part seconds --out bench/results/pareto_seconds.json

A setup is a demo model, a sampler and a number of calls. All methods run on the same prompts and
noise; they choose their settings on other clips (`--seen`), each for the same numbers of calls.
Quality is the PSNR and SSIM of each clip to the full run of the same sampler, and to the fine
solution of the same noise, with means, standard deviations and the worst clip; and the share of
clips that the model's judge accepts.

`--part fidelity` measures quality by share of operations: no times, so that it may run on a busy
machine; nothing is compiled. `--part seconds` times a few of these points, compiled and
interleaved, and needs a quiet one. `--part grids` finds the calls that a plan needs for the
accuracy of the best sampler, on finer grids; `--part guidance` at which speed a plan falls below
40 dB for other scales of guidance and shifts; `--part ablations` is `ablations.py`.

The result grows by a point at a time; with `--resume`, points that are there are not measured
again, but for those of the methods of `--again`. Full runs, fine solutions and trials are kept in
`--store`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import pareto_grids
import pareto_plot
import pareto_table
import report
import rows
import torch
from pareto_methods import NotReached, run_choice
from pareto_points import FEWER, FULL, METHODS, SPEEDS, Point, list_points
from pareto_quality import compare
from pareto_samplers import make_sampler
from pareto_seconds import format_seconds, measure_seconds
from pareto_setups import Setup, Subject, load_subject
from torch import Tensor

MODELS = ("digits", "emoji")
FINE = "fine"
YARDSTICKS = {"fidelity": (FULL, FINE), "grids": (FINE,), "guidance": (FULL,), "seconds": ()}
"""The references that samples are compared with, by part: the full run, the fine solution."""
Row = dict[str, Any]


def main() -> None:
    """Measures the part that the options name; prints tables, writes JSON and pictures."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    diffusers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    settings = {name: getattr(options, name) for name in ("part", "smoke", "judged", "seen")}
    found = rows.Rows(
        options.out, report.describe_run(), settings, options.resume, is_same_commit=False
    )
    for name in [name for name, row in found.rows.items() if row["method"] in options.again]:
        del found.rows[name]
    for name in options.models:
        subject = load_subject(
            name,
            options.judged,
            options.seen,
            options.store,
            fine_calls=12 if options.smoke else 1000,
            is_trained=not options.smoke,
            weights=options.weights,
        )
        if options.part == "seconds":
            measure_times(subject, options, found)
        for point in list_points(subject, options):
            if point.name not in found:
                begin = time.perf_counter()
                row = measure(subject, point, options.part)
                found.add(point.name, {**row, "commit": report.read_commit()})
                show(f"{point.name}: {describe(row)}, {time.perf_counter() - begin:.0f} s")
    print(FORMATS[options.part](found.rows))
    if options.out is not None and options.part == "fidelity":
        for path in pareto_plot.draw_all(options.out, found.rows):
            print(f"wrote {path}")


def parse_options() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    rows.add_options(parser)
    add("--part", choices=tuple(YARDSTICKS), default="fidelity")
    add("--models", type=_split, default=list(MODELS), help=f"some of {', '.join(MODELS)}")
    add("--methods", type=_split, help=f"some of {FEWER}, {', '.join(METHODS)}; default: all")
    add("--again", type=_split, default=[], help="methods whose points are measured again")
    add("--samplers", type=_split, help="of the setups; default: some of each model's")
    add("--calls", type=_split_numbers, help="of the full runs of the setups")
    add("--judged", type=_split_numbers, default=[2, 3], help="seeds, and clips of each seed")
    add("--seen", type=int, default=1, help="clips by which settings are chosen")
    add("--weights", type=Path, help="folder of the one model, in place of the package's")
    add("--threads", type=int, default=1)
    add("--rounds", type=int, default=10, help="timed generations of --part seconds")
    default = Path(tempfile.gettempdir()) / "pabc-pareto"
    add("--store", type=Path, default=default, help="folder of what is kept")
    options = parser.parse_args()
    if options.smoke:
        options.judged, options.rounds = [1, 2], 2
    known = {"models": MODELS, "methods": (*METHODS, FEWER), "again": tuple(METHODS)}
    for name, allowed in known.items():
        if unknown := set(getattr(options, name) or ()) - set(allowed):
            expected = ", ".join(allowed)
            parser.error(f"--{name}: expected some of {expected}, found {', '.join(unknown)}")
    return options


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _split_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def measure_times(subject: Subject, options: argparse.Namespace, found: rows.Rows) -> None:
    """Adds the seconds of a model, unless they are there."""
    speeds = SPEEDS[:1] if options.smoke else SPEEDS
    name = subject.model.name
    if name not in found:
        backend = "eager" if options.smoke else "inductor"
        measured = measure_seconds(subject, options.rounds, show, speeds=speeds, backend=backend)
        found.add(name, {"method": "seconds", "variants": measured})


def format_times(found: Mapping[str, Row]) -> str:
    """Returns the tables of seconds."""
    tables = [f"\n{name}\n{format_seconds(row['variants'])}" for name, row in found.items()]
    return "\n".join(tables)


def measure(subject: Subject, point: Point, part: str) -> Row:
    """Returns the row of a point; one with `error` where it cannot be run."""
    setup = point.setup
    row: Row = {**asdict(setup), "method": point.method, "allowed": point.allowed}
    row["num_calls"] = subject.loop(setup, subject.judged).num_calls
    try:
        samples, facts = generate(subject, point)
    except NotReached as error:
        return {**row, "not_reached": str(error)}
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return {**row, "error": f"{type(error).__name__}: {lines[0]}"[:200]}
    return {**row, **facts, **judge(subject, setup, samples, YARDSTICKS[part])}


def generate(subject: Subject, point: Point) -> tuple[Tensor, Row]:
    """Returns the judged samples of a point, and how they were made."""
    setup, num_calls = point.setup, subject.loop(point.setup, subject.judged).num_calls
    if point.method == FULL:
        return subject.full(setup), {"computed": num_calls, "share": 1.0, "setting": ""}
    if point.method.startswith(FEWER):
        name = point.method.removeprefix(f"{FEWER}, ")
        fewer = Setup(setup.model, name, point.allowed, setup.guidance, setup.shift)
        calls = len(make_sampler(subject.model.scheduler, name, point.allowed).timesteps)
        return subject.full(fewer), {"computed": calls, "share": calls / num_calls, "setting": ""}
    choice = METHODS[point.method].choose(subject, setup, point.allowed)
    samples, share = run_choice(subject.loop(setup, subject.judged), choice)
    facts = {"computed": choice.computed, "share": round(share, 5), "setting": choice.setting}
    return samples, {**facts, **choice.facts}


def judge(subject: Subject, setup: Setup, samples: Tensor, yardsticks: tuple[str, ...]) -> Row:
    """Returns how near samples are to the full run or the fine solution, and their accuracy."""
    accuracy = subject.model.judge(samples, subject.judged.prompts)
    row = {f"right_{name.removesuffix('_accuracy')}": each for name, each in accuracy.items()}
    if FULL in yardsticks:
        row |= compare(samples, subject.full(setup))
    if FINE in yardsticks:
        found = compare(samples, subject.fine(setup))
        row |= {f"fine_{name}": value for name, value in found.items()}
    return row


def describe(row: Row) -> str:
    """Returns the most important figures of a row."""
    if "setting" not in row:
        return str(row.get("error") or row.get("not_reached"))
    names = [name for name in ("psnr", "fine_psnr") if name in row]
    figures = [f"{row[name]:.1f} dB ({row[f'{name}_min']:.1f})" for name in names]
    return f"{row['share']:.1%}, {', to the fine solution '.join(figures)}"


def show(text: str) -> None:
    """Prints the state of the run."""
    print(text, file=sys.stderr, flush=True)


FORMATS = {
    "fidelity": pareto_table.format_tables,
    "grids": pareto_grids.format_grids,
    "guidance": pareto_grids.format_guidance,
    "seconds": format_times,
}


if __name__ == "__main__":
    main()
