"""Measures the overhead of a call in microseconds: guards, the step, the choice of the phase.

    python bench/dispatch.py --out bench/results/dispatch.json

A Latte of each depth, with narrow channels, follows a pyramid of 30 steps. After one generation,
the code of each phase is replaced by a function that returns its last results, so that the rest of
a call is pabc's overhead. Rows, per depth:

- `steady`: a step that neither begins a generation nor stores anything;
- `storing`: a step that stores cuts for later steps;
- `first`: the first step of a generation, which checks the whole model for changes;
- `mean`: over all steps of a generation.

Times are medians over generations, of wall-clock time and, as `thread`, of this thread's CPU time,
which is less sensitive to other processes. `calls` is the number of Python function calls in a
steady step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import report
import torch
from torch import nn

import pabc

DEPTHS = (4, 12, 28)
STEPS = tuple(range(1000, 10, -33))[:30]
WARM_UP = 5


class Recorded:
    """The code of a phase, which runs once; later calls return the same results."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run
        self._results: Any = None

    def __call__(self, *inputs: Any) -> Any:
        """Returns the results of the first call."""
        if self._results is None:
            self._results = self._run(*inputs)
        return self._results


def make_model(depth: int) -> nn.Module:
    """Returns a Latte of `depth` spatial and `depth` temporal blocks."""
    from diffusers import LatteTransformer3DModel

    return LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=depth,
        cross_attention_dim=24,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=10,
        video_length=3,
    ).eval()


def compile_recorded(depth: int) -> tuple[pabc.CompiledModel, Callable[[int], Any]]:
    """Returns a compiled model whose phases return recorded results, and the calls of its steps."""
    schedule = pabc.Schedule.pyramid(STEPS, spatial=2, temporal=4, cross=6, fraction=(0.15, 0.85))
    fast = pabc.compile(make_model(depth), schedule, backend="eager")
    latents, text = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 5, 10)
    times = [torch.tensor([t, t]) for t in STEPS]

    def call(step: int) -> Any:
        return fast(latents, timestep=times[step], encoder_hidden_states=text)

    run_generation(call)
    for _, program in fast._programs.items():
        made = program.phases._executables
        made.update({key: replace(e, function=Recorded(e.function)) for key, e in made.items()})
    run_generation(call)
    return fast, call


def run_generation(call: Callable[[int], Any]) -> None:
    """Runs all steps, in order."""
    for step in range(len(STEPS)):
        call(step)


def time_steps(call: Callable[[int], Any], clock: Callable[[], int]) -> list[float]:
    """Returns the microseconds of each step of a generation."""
    found = []
    for step in range(len(STEPS)):
        start = clock()
        call(step)
        found.append((clock() - start) / 1e3)
    return found


def count_calls(call: Callable[[int], Any], steps: Sequence[int]) -> int:
    """Returns the least number of Python function calls in any of these steps."""
    counts = []
    for step in range(len(STEPS)):
        entered: list[str] = []
        sys.setprofile(lambda frame, event, _, entered=entered: entered.append(event))
        call(step)
        sys.setprofile(None)
        counts.append(entered.count("call"))
    return min(counts[step] for step in steps)


def measure(depth: int, generations: int) -> dict[str, Any]:
    """Returns the rows of one depth."""
    fast, call = compile_recorded(depth)
    plan = fast.plan
    storing = [s for s in range(1, plan.num_steps) if (plan.until[s][~plan.reuse[s]] >= 0).any()]
    steady = [s for s in range(1, plan.num_steps - 1) if s not in storing]
    kinds = {"steady": steady, "storing": storing, "first": [0], "mean": range(plan.num_steps)}
    for _ in range(WARM_UP):
        run_generation(call)
    row: dict[str, Any] = {"depth": depth, "slots": len(plan.slots)}
    clocks = {"wall": time.perf_counter_ns, "thread": time.thread_time_ns}
    found = {
        name: [time_steps(call, clock) for _ in range(generations)]
        for name, clock in clocks.items()
    }
    for kind, steps in kinds.items():
        row[kind] = {
            name: report.summarize([statistics.mean(g[s] for s in steps) for g in generation], 2)
            for name, generation in found.items()
        }
    row["calls"] = count_calls(call, steady)
    return row


def main() -> None:
    """Measures all depths; prints a table, and writes JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--generations", type=int, default=200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = report.describe_run()
    with torch.no_grad():
        rows = [measure(depth, options.generations) for depth in DEPTHS]
    kinds = ("steady", "storing", "first", "mean")
    header = (
        "depth",
        "slots",
        "calls",
        *(f"{k}, us ({c})" for k in kinds for c in ("wall", "thread")),
    )
    table = [
        (
            f"{row['depth']}+{row['depth']}",
            row["slots"],
            row["calls"],
            *(report.format_spread(row[k][c], 1) for k in kinds for c in ("wall", "thread")),
        )
        for row in rows
    ]
    print(report.format_table(header, table))
    if options.out is not None:
        report.write_json(options.out, {**facts, "generations": options.generations, "rows": rows})


if __name__ == "__main__":
    main()
