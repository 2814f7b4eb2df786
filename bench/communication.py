"""Measures the bytes that ranks send in a generation, without and with reuse; checks results.

    python bench/communication.py --out bench/results/communication.json

Two tables, of Latte, Open-Sora 1.2 and CogVideoX, 30 steps. The schedules are 2/4/6 (CogVideoX:
joint attention every second step) in the middle 70 % of the steps, and `Schedule.skip` with a half
and a third of the calls, "skip 2x" and "skip 3x":

- measured: whole generations at the shapes of `bench/peers.py`, float32, in 2, 3 and 4 processes
  (gloo): the largest difference at any step from one process with the same schedule; the bytes that
  a rank sends to others, counted at each collective, and as `explain()` predicts them; with
  `--shard`, tokens are sharded along that dimension;
- predicted: at published sizes, bfloat16, by `pabc.explain(ranks=...)` on the meta device, for 2, 4
  and 8 ranks: the bytes of each kind of region, and their sum.

A ratio is bytes with reuse over bytes without. For all, tokens are sharded along the dimension for
which a rank sends the fewest bytes with 2/4/6, as pabc chooses.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import report
import torch
from ranks import CountSent, compile_for, generate, launch, make_schedules, make_skips, work
from rows import Row, Rows, add_options
from torch.distributed.device_mesh import DeviceMesh
from workloads import FULL, SMALL, TINY, Workload, build, draw, first_timestep

import pabc
from pabc.plan import SlotSpec

MODELS = ("latte", "opensora", "cogvideox")
REUSE = ("2/4/6", "skip 2x", "skip 3x")
AIMS = {"skip 2x": 0.51, "skip 3x": 0.35}
"""Schedule -> the largest share of the bytes without reuse."""


def main() -> None:
    """Measures and predicts the rows that the options name; prints tables, writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    add = parser.add_argument
    add("--models", type=lambda text: text.split(","), default=list(MODELS))
    add("--ranks", type=_numbers, default=[2, 3, 4], help="numbers of ranks to measure")
    add("--predict", type=_numbers, default=[2, 4, 8], help="numbers of ranks to predict")
    add("--shard", type=int, help="measured rows: the dimension of the latents to shard")
    add("--steps", type=int, default=30)
    add("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options.worker, run_ranks)
        return
    settings = {"steps": options.steps, "smoke": options.smoke}
    rows = Rows(options.out, report.describe_run(), settings, options.resume)
    for name in options.models:
        for ranks in options.ranks:
            task = {"model": name, "steps": options.steps, "smoke": options.smoke}
            task["shard"] = options.shard
            along = "" if options.shard is None else f", dimension {options.shard}"
            label = f"{name}, {ranks} ranks{along}, measured"
            rows.measure(label, lambda r=ranks, t=task: launch(__file__, r, t))
        for ranks in options.predict:
            label = f"{name}, {ranks} ranks, predicted"
            rows.measure(label, lambda r=ranks, n=name: predict(n, r, options))
    rows.write()
    print_tables(rows)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def run_ranks(mesh: DeviceMesh, task: Any) -> Row:
    """Measures a row in one of its processes."""
    workload = (TINY if task["smoke"] else SMALL)[task["model"]]
    model, steps = build(workload), task["steps"]
    row: Row = {"model": task["model"], "ranks": mesh.size()}
    schedules = {**make_schedules(workload, steps), **make_skips(workload, steps)}
    fast = compile_for(model, schedules["2/4/6"], mesh, "eager", task["shard"])
    fast(**example_call(workload))  # captured under this schedule, for which pabc picks the dim
    fast.reset()
    for name, schedule in schedules.items():
        fast.schedule = schedule
        with CountSent() as sent:
            outputs = generate(workload, fast, steps)
        found = fast.explain().communication
        assert found is not None
        if mesh.get_rank() > 0:  # the first rank compares
            continue
        alone = pabc.compile(model, schedule, backend="eager")
        expected = generate(workload, alone, steps)
        pairs = zip(outputs, expected, strict=True)
        row[name] = {
            "max_error": max(float((a - b).abs().max()) for a, b in pairs),
            "max_value": max(float(b.abs().max()) for b in expected),
            "calls": sent.calls,
            "bytes": sent.nbytes,
            "predicted": int(found.bytes_at(fast.plan).sum()),
        }
    assert fast.stats.captures == 1, fast.stats
    row["divided"] = [str(each.axis) for each in found.sharded]
    return row


def example_call(workload: Workload, device: str = "cpu", dtype: Any = torch.float32) -> Any:
    """Returns the arguments of one call of the model, with guidance."""
    start = draw(workload, 0, device, dtype)
    batch = torch.cat([start.latents, start.latents])
    return workload.call(batch, first_timestep(workload, device).expand(len(batch)), start.text)


def predict(name: str, ranks: int, options: argparse.Namespace) -> Row:
    """Returns a predicted row."""
    workload = (TINY if options.smoke else FULL)[name]
    model = build(workload, "meta", torch.bfloat16)
    schedules = make_schedules(workload, options.steps) | make_skips(workload, options.steps)
    call = example_call(workload, "meta", torch.bfloat16)
    found = pabc.explain(model, **call, schedule=schedules["2/4/6"], ranks=ranks)
    communication = found.communication
    assert communication is not None and found.plan is not None
    kinds: dict[str, int] = {"outside": sum(each.nbytes for each in communication.outside)}
    for kind, region in zip(communication.kinds, communication.regions, strict=True):
        kinds[kind] = kinds.get(kind, 0) + sum(each.nbytes for each in region)
    row: Row = {
        "model": name,
        "ranks": ranks,
        "divided": [str(each.axis) for each in communication.sharded],
        "kinds": kinds,
        "no reuse": {"bytes": sum(kinds.values()) * options.steps},
    }
    inner = [replace(slot, outer=("model",)) for slot in found.plan.slots]
    slots = [*inner, SlotSpec("model", "model", 0)]
    for label in REUSE:
        sent = communication.bytes_at(schedules[label].plan(slots))
        row[label] = {"bytes": int(sent.sum())}
    return row


def print_tables(rows: Rows) -> None:
    """Prints both tables."""
    measured = [row for name, row in rows.rows.items() if name.endswith("measured")]
    predicted = [row for name, row in rows.rows.items() if name.endswith("predicted")]
    header = ["measured", "ranks", "divided", "max error", "of values up to", *_header()]
    lines = []
    for row in measured:
        found = [row[name] for name in ("no reuse", *REUSE)]
        error = max(each["max_error"] for each in found)
        lines.append(
            [row["model"], row["ranks"], " ".join(row["divided"])]
            + [f"{error:.1e}", f"{row['no reuse']['max_value']:.1f}", *_megabytes(row)]
            + [str(all(each["bytes"] == each["predicted"] for each in found))]
        )
    print(report.format_table([*header, "as explained"], lines))
    print()
    header = ["predicted, published size", "ranks", "divided", *_header()]
    lines = []
    for row in predicted:
        shares = {kind: n / max(1, sum(row["kinds"].values())) for kind, n in row["kinds"].items()}
        sent = ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items() if share)
        lines.append([row["model"], row["ranks"], " ".join(row["divided"]), *_megabytes(row), sent])
    print(report.format_table([*header, "of a step that computes everything"], lines))


def _header() -> list[str]:
    return ["MB, no reuse", *(name for label in REUSE for name in (f"MB, {label}", "ratio"))]


def _megabytes(row: Row) -> list[str]:
    """Returns the cells of bytes, and of ratios, with a mark where an aim is missed."""
    none = row["no reuse"]["bytes"]
    cells = [f"{none / 1e6:.1f}"]
    for name in REUSE:
        ratio = row[name]["bytes"] / none if none else 0.0
        mark = " !" if ratio > AIMS.get(name, 1.0) else ""
        cells += [f"{row[name]['bytes'] / 1e6:.1f}", f"{ratio:.3f}{mark}" if none else "-"]
    return cells


if __name__ == "__main__":
    main()
