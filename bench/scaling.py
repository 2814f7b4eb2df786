"""Measures how seconds and bytes grow with tokens, layers, steps and batch, one at a time.

    python bench/scaling.py --out bench/results/scaling.json

The model is diffusers' Latte with random weights; the schedule is 2/4/6 over the middle 70 %. For
each value of a factor, there is a compiled model; all generate in turn, round after round, after a
generation that warms up and is not timed. A slope is that of the least-squares line through the
logarithms: 1 is linear growth, 0 is none. `last` is the slope between the two largest values, which
constant costs affect least. `EXPECTED` has the expected slopes, and the reasons.

- `step`: seconds of a generation over its number of steps; `eager`: the same of the model itself;
- `bytes`: bytes held after the fullest step, counted while it runs; `planned`: as planned;
- `capture`: seconds of the capture and the passes, once; `compile`: of specializing and compiling
  all phases, once, with an empty Inductor cache; for `steps`, one compiled model serves all values;
- `plan`: seconds to make the plan for these steps and slots.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import report
import torch
from latte import make_latte, make_schedule
from rows import Row, Rows, add_options
from torch import nn
from torch._inductor.utils import fresh_cache
from workloads import build, draw

import pabc

NUM_PLANS = 9
"""The number of times that a plan is made in each round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A model's size: `depth` blocks of each kind, 2 x 2 patches of `side` x `side` latents."""

    depth: int = 2
    width: int = 64
    frames: int = 4
    side: int = 24
    batch: int = 1
    steps: int = 20

    @property
    def tokens(self) -> int:
        """The tokens of one clip."""
        return self.frames * (self.side // 2) ** 2


FACTORS: dict[str, tuple[str, tuple[int, ...]]] = {
    "tokens": ("side", (16, 24, 32, 48)),
    "layers": ("depth", (1, 2, 4, 8)),
    "steps": ("steps", (10, 30, 90, 270)),
    "batch": ("batch", (1, 2, 4, 8)),
}
"""Factor -> the field of a size that varies, and its values."""
SMOKE = {
    "tokens": ("side", (4, 8)),
    "layers": ("depth", (1, 2)),
    "steps": ("steps", (7, 14)),
    "batch": ("batch", (1, 2)),
}
TINY = Size(depth=1, width=16, frames=2, side=8, steps=7)

Slopes = tuple[float, float]
EXPECTED: dict[str, dict[str, Slopes]] = {
    # Linear layers grow linearly with the tokens, attention quadratically.
    "tokens": {"step": (1, 2), "bytes": (1, 1), "capture": (0, 0), "compile": (0, 0)},
    # The graph grows with the layers; equal blocks are compiled once.
    "layers": {
        "step": (1, 1),
        "bytes": (1, 1),
        "capture": (1, 1),
        "compile": (0, 1),
        "plan": (0, 1),
    },
    # The share of steps that reuse is constant; a slot holds one value for any number of steps.
    "steps": {"step": (0, 0), "bytes": (0, 0), "plan": (1, 1)},
    "batch": {"step": (1, 1), "bytes": (1, 1), "capture": (0, 0), "compile": (0, 0)},
}
"""Factor -> measurement -> least and greatest slope that the design implies for large values.

Slopes between small values are less, as every call, pass and plan has a constant part.
"""


@dataclass
class Point:
    """A value of a factor: the functions to time, and their measurements."""

    value: int
    size: Size
    generate: Callable[[], None]
    generate_eager: Callable[[], None]
    plan: Callable[[], object]
    once: Row
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def time(self, name: str, run: Callable[[], object], count: int) -> None:
        """Times `run`, which does `count` things; records the seconds of one of them."""
        start = time.perf_counter()
        run()
        self.seconds.setdefault(name, []).append((time.perf_counter() - start) / count)

    def run_round(self) -> None:
        """Times a generation of pabc, one of the eager model, and some plans."""
        self.time("step", self.generate, self.size.steps)
        self.time("eager", self.generate_eager, self.size.steps)
        for _ in range(NUM_PLANS):
            self.time("plan", self.plan, 1)

    def row(self) -> Row:
        """Returns the measurements."""
        found = {name: report.summarize(each, 7) for name, each in self.seconds.items()}
        return {"value": self.value, **self.once, **found}


def main() -> None:
    """Measures the factors that the options name; prints tables, writes the JSON."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    names = ("factors", "backend", "rounds", "threads", "smoke")
    settings = {name: getattr(options, name) for name in names}
    rows = Rows(options.out, report.describe_run(), settings, options.resume)
    factors = SMOKE if options.smoke else FACTORS
    base = TINY if options.smoke else Size()
    missing = [name for name in options.factors if name not in rows]
    if missing and not options.smoke:
        Compiled(TINY, options.backend)  # imports, and other work that is done once per process
    for name in missing:
        rows.add(name, measure_factor(name, *factors[name], base, options))
    summary = [slope for name, row in rows.rows.items() for slope in find_slopes(name, row)]
    rows.write(slopes=summary)
    print(format_points(rows.rows))
    print(f"\n{format_slopes(summary)}")
    if options.backend == "eager":
        print("\nbackend eager: graphs are specialized and not compiled further")


def parse_options() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    add = parser.add_argument
    add("--factors", type=lambda text: text.split(","), default=list(FACTORS))
    add("--backend", choices=("inductor", "eager"), help="default inductor; eager with --smoke")
    add("--rounds", type=int, help="timed generations of each point; default 3")
    add("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    options.backend = options.backend or ("eager" if options.smoke else "inductor")
    options.rounds = options.rounds or (1 if options.smoke else 3)
    if unknown := set(options.factors) - set(FACTORS):
        expected = ", ".join(FACTORS)
        parser.error(f"--factors: expected some of {expected}, found {', '.join(unknown)}")
    return options


class Compiled:
    """A model of one size, as it is and compiled for its schedule."""

    def __init__(self, size: Size, backend: str) -> None:
        self.workload = make_latte(
            depth=size.depth,
            width=size.width,
            frames=size.frames,
            side=size.side,
            num_clips=size.batch,
        )
        self.start = draw(self.workload, 0)
        self.latents = torch.cat([self.start.latents] * 2)
        self.model = build(self.workload)
        schedule = make_schedule(self.workload, size.steps)
        begin = time.perf_counter()
        fast = pabc.compile(self.model, schedule, backend=backend)  # type: ignore[arg-type]
        with empty_cache(backend):
            fast.prepare(**self._call(schedule.timesteps[0]))
        seconds = time.perf_counter() - begin
        self.fast, found = fast, fast.explain()
        self.seconds = {
            "capture": seconds - found.compile_seconds,
            "compile": found.compile_seconds,
        }

    def _call(self, timestep: float) -> dict[str, Any]:
        when = torch.full((len(self.latents),), timestep)
        return self.workload.call(self.latents, when, self.start.text)

    def point(self, value: int, size: Size, once: Row) -> Point:
        """Returns this model as a point with the steps of `size`; runs it once to count bytes."""
        schedule = make_schedule(self.workload, size.steps)
        calls = [self._call(timestep) for timestep in schedule.timesteps]

        def generate() -> None:
            self.fast.schedule = schedule
            run(self.fast, calls)

        held = self._count_bytes(schedule, calls)
        facts = {
            "bytes": max(held),
            "planned": self.fast.plan.peak_bytes,
            "phases": len(self.fast.plan.phases),
            "shapes": {**self.workload.shapes, "tokens": size.tokens},
        }
        return Point(
            value,
            size,
            generate,
            generate_eager=lambda: run(self.model, calls),
            plan=partial(schedule.plan, self.fast.plan.slots),
            once={**facts, **once},
        )

    def _count_bytes(self, schedule: pabc.Schedule, calls: Sequence[dict[str, Any]]) -> list[int]:
        """Returns the bytes of slots after each step; compiles the phases of a new schedule."""
        self.fast.schedule = schedule
        held = []
        with torch.no_grad():
            for call in calls:
                self.fast(**call)
                held.append(self.fast.stats.nbytes)
        return held


def empty_cache(backend: str) -> AbstractContextManager[Any]:
    """Uses an empty Inductor cache within the context."""
    made: AbstractContextManager[Any] = fresh_cache() if backend == "inductor" else nullcontext()
    return made


@torch.no_grad()
def run(model: nn.Module, calls: Sequence[dict[str, Any]]) -> None:
    """Runs one generation."""
    for call in calls:
        model(**call)


def measure_factor(
    name: str, varied: str, values: Sequence[int], base: Size, options: argparse.Namespace
) -> Row:
    """Measures the points of one factor in turn."""
    points = []
    compiled: Compiled | None = None
    for value in values:
        size = replace(base, **{varied: value})
        if compiled is None or name != "steps":
            compiled = Compiled(size, options.backend)
        once = {} if name == "steps" else dict(compiled.seconds)
        points.append(compiled.point(size.tokens if name == "tokens" else value, size, once))
    for i in range(options.rounds):
        for j in range(len(points)):
            points[(i + j) % len(points)].run_round()
    return {"points": [point.row() for point in points]}


def find_slopes(factor: str, row: Row) -> list[Row]:
    """Returns the measured slopes of one factor, and the expected ones."""
    points = row["points"]
    values = [point["value"] for point in points]
    found = []
    for name, (low, high) in EXPECTED[factor].items():
        measured = [_middle(point[name]) for point in points]
        slope, last = fit(values, measured), fit(values[-2:], measured[-2:])
        slopes = {"slope": round(slope, 3), "last": round(last, 3), "expected": [low, high]}
        found.append({"factor": factor, "what": name, **slopes})
    return found


def _middle(measured: Any) -> float:
    return float(measured["median"] if isinstance(measured, dict) else measured)


def fit(values: Sequence[float], measured: Sequence[float]) -> float:
    """Returns the slope of the least-squares line through the logarithms."""
    return statistics.linear_regression(
        [math.log(value) for value in values], [math.log(each) for each in measured]
    ).slope


def format_points(rows: dict[str, Row]) -> str:
    """Returns the table of points."""
    header = ("factor", "ms a step (min to max)", "eager", "KiB", "planned", "capture s")
    lines = []
    for name, row in rows.items():
        for point in row["points"]:
            step = {key: 1e3 * seconds for key, seconds in point["step"].items()}
            cells = [f"{name} {point['value']}", report.format_spread(step, 2)]
            cells += [f"{1e3 * point['eager']['median']:.2f}"]
            cells += [f"{point[each] / 1024:.1f}" for each in ("bytes", "planned")]
            cells += [f"{point[each]:.2f}" if each in point else "-" for each in ONCE]
            lines.append([*cells, f"{1e3 * point['plan']['median']:.2f}", point["phases"]])
    return report.format_table([*header, "compile s", "plan ms", "phases"], lines)


ONCE = ("capture", "compile")


def format_slopes(summary: Sequence[Row]) -> str:
    """Returns the table of slopes."""
    header = ("slope against", "measured", "last", "expected")
    lines = []
    for row in summary:
        low, high = row["expected"]
        expected = f"{low}" if low == high else f"{low} to {high}"
        what = f"{row['factor']}: {row['what']}"
        lines.append([what, f"{row['slope']:.2f}", f"{row['last']:.2f}", expected])
    return report.format_table(header, lines)


if __name__ == "__main__":
    main()
