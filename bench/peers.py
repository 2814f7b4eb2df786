"""Times whole sampling loops side by side: eager, torch.compile, other caches, and pabc.

    python bench/peers.py --out bench/results/peers.json

Each variant of a model has a process and a copy of the model of its own, with the same weights,
noise, text, scheduler and threads. It is prepared (captured, compiled, calibrated: the column
`prepare`), generates once to warm up and once to count the attentions that run; then all variants
generate in turn, round after round, in an order that rotates. Times are medians with minimum and
maximum. PSNR and SSIM compare the last latents with the full eager run's: on random weights, they
show whether results are equal, but say nothing about quality.

pabc and diffusers' Pyramid Attention Broadcast follow the same schedule, ranges of 2/4/6 for
spatial, temporal and cross attention in the middle 70 % of the steps, so that their `attentions`
must be equal. The other caches are other approximations, with the settings of their documentation.
On random weights, the number of steps skipped by caches that depend on the data means nothing.

The variants that skip whole calls (bench/skips.py) all compute the same number, `--computed`: fewer
steps of the sampler, pabc's `Schedule.skip`, and TaylorSeer, MagCache and FirstBlockCache with the
settings that are best for this noise.

Compare wall-clock times. `cpu_seconds` in the JSON is the CPU time of all threads, busy waiting
included: with one thread, it is more reliable on a busy machine.

An interrupted run resumes, model by model, if it is started again with the same options at the same
commit. The output of a variant is in the log beside the result.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import report
import torch
from peers_table import format_model
from torch import Tensor
from variants import VARIANTS
from workers import SIZES, Task, Worker, median_steps
from workloads import Workload, as_pictures

from pabc.demo import judge, machine

Row = dict[str, Any]


def main() -> None:
    """Measures the models and variants that the options name; prints tables, writes the JSON."""
    options = parse_options()
    settings = {
        name: getattr(options, name)
        for name in ("size", "models", "variants", "steps", "computed", "rounds", "seed")
    }
    settings |= {"device": options.device, "threads": options.threads}
    torch.set_num_threads(options.threads)
    for warning in machine.find_busy_machine():
        print(f"warning: {warning}", file=sys.stderr)
    content = {
        **report.describe_run(options.device, ["cache-dit"]),
        "settings": settings,
        "models": find_done(options.out, settings),
    }
    for name in options.models:
        if name not in content["models"]:
            measure_model(name, options, content)
        print(format_model(name, content["models"][name]), flush=True)
    if options.out is not None:
        print(f"\nwrote {options.out}")


def parse_options() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, help="JSON to write, updated during the run")
    add("--models", type=split, help=f"some of {', '.join(SIZES['small'])}; default: all")
    add("--variants", type=lambda text: split(text, ";"), help=f"some of {'; '.join(VARIANTS)}")
    add("--steps", type=int, help="default 30")
    add("--computed", type=int, help="calls that variants compute which skip others; default: half")
    add("--rounds", type=int, help="timed generations of each variant; default 3")
    add("--seed", type=int, default=0)
    add("--device", default="cpu")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--limit", type=float, default=1200, help="seconds that a variant may take to prepare")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full-size", action="store_true", help="published sizes in bfloat16")
    size.add_argument("--smoke", action="store_true", help="tiny models, few steps, one round")
    options = parser.parse_args()
    options.size = "full" if options.full_size else "tiny" if options.smoke else "small"
    options.steps = options.steps or (7 if options.smoke else 30)
    options.rounds = options.rounds or (1 if options.smoke else 3)
    options.computed = options.computed or options.steps // 2
    known = {"models": list(SIZES[options.size]), "variants": list(VARIANTS)}
    for name, allowed in known.items():
        wanted = getattr(options, name) or allowed
        if unknown := set(wanted) - set(allowed):
            expected = ", ".join(allowed)
            parser.error(f"--{name}: expected some of {expected}, found {', '.join(unknown)}")
        setattr(options, name, [each for each in allowed if each in wanted or each == "eager"])
    return options


def split(text: str, separator: str = ",") -> list[str]:
    """Returns the items of a list on the command line."""
    return [part.strip() for part in text.split(separator)]


def find_done(out: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the models that an interrupted run measured with these settings at this commit."""
    if out is None or not out.exists():
        return {}
    content = json.loads(out.read_text())
    models: dict[str, Any] = content.get("models", {})
    is_same = content.get("settings") == settings and content["commit"] == report.read_commit()
    done = {name: model for name, model in models.items() if model["is_done"]}
    if not is_same or len(done) == len(settings["models"]):
        return {}
    return done


def measure_model(name: str, options: argparse.Namespace, content: dict[str, Any]) -> None:
    """Adds the measurements of one model to `content`, and writes it each time that it grows."""
    workload = SIZES[options.size][name]
    rows: dict[str, Row] = {
        variant: {"about": VARIANTS[variant].about} for variant in options.variants
    }
    model = {"is_done": False, "is_trained": workload.is_trained, **workload.shapes, "rows": rows}
    content["models"][name] = model
    workers: dict[str, Worker] = {}
    try:
        prepare_all(name, options, content, workers)
        race(workers, rows, options, content)
        for variant, worker in workers.items():
            rows[variant] |= worker.ask("finish", 60)
    finally:
        for worker in workers.values():
            worker.stop()
    model["is_done"] = True
    save(options, content)


def prepare_all(
    name: str, options: argparse.Namespace, content: dict[str, Any], workers: dict[str, Worker]
) -> None:
    """Prepares a worker per variant, the eager model's first: others are compared with it."""
    rows = content["models"][name]["rows"]
    log = (options.out or Path("peers")).with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    reference: Tensor | None = None
    weights = None
    for variant, row in rows.items():
        progress(f"{name}: prepare {variant}")
        task = Task(
            size=options.size,
            model=name,
            variant=variant,
            steps=options.steps,
            device=options.device,
            threads=options.threads,
            seed=options.seed,
            computed=options.computed,
            log=log.absolute(),
        )
        worker = Worker(task)
        answer = worker.ask("prepare", options.limit)
        if "error" in answer:
            row["error"] = answer["error"]
            worker.stop()
            if variant == "eager":
                raise RuntimeError(
                    f"{name}: expected the full model to run, found an error: {answer['error']}"
                )
        else:
            workers[variant] = worker
            latents = torch.from_numpy(answer.pop("latents"))
            reference = latents if reference is None else reference
            weights = answer["weights"] if weights is None else weights
            assert answer.pop("weights") == weights, f"{name}: {variant} has other weights"
            workload = SIZES[options.size][name]
            row |= {**answer, **compare(workload, latents, reference)}
        save(options, content)


def compare(workload: Workload, latents: Tensor, reference: Tensor) -> dict[str, Any]:
    """Returns PSNR and SSIM, means over clips; PSNR is None for clips equal bit for bit."""
    pictures, others = (as_pictures(workload, x, reference) for x in (latents, reference))
    found = judge.psnr(pictures, others)
    psnr, worst = float(found.mean()), float(found.min())
    fits = min(pictures.shape[-2:]) >= 11  # SSIM's window
    return {
        "is_equal": torch.equal(latents, reference),
        "is_finite": bool(latents.isfinite().all()),
        "psnr": round(psnr, 2) if math.isfinite(psnr) else None,
        "psnr_min": round(worst, 2) if math.isfinite(worst) else None,
        "ssim": round(float(judge.ssim(pictures, others).mean()), 5) if fits else None,
    }


def race(
    workers: dict[str, Worker],
    rows: dict[str, Row],
    options: argparse.Namespace,
    content: dict[str, Any],
) -> None:
    """Runs the rounds: every variant generates once in each, in an order that rotates."""
    names = list(workers)
    generations: dict[str, list[Row]] = {name: [] for name in names}
    for index in range(options.rounds):
        shift = index % len(names)
        for name in (*names[shift:], *names[:shift]):
            if "error" in rows[name]:
                continue
            progress(f"round {index + 1} of {options.rounds}: {name}")
            answer = workers[name].ask("generate", options.limit)
            if "error" in answer:
                rows[name]["error"] = answer["error"]
                continue
            generations[name].append(answer)
            rows[name] |= summarize(rows[name], generations[name])
        save(options, content)
    progress("")


def summarize(row: Row, generations: list[Row]) -> Row:
    """Returns the entries of a row about its timed generations so far."""
    seconds = [generation["seconds"] for generation in generations]
    found = report.summarize(seconds)
    extra = row["prepare_seconds"] + row["first_seconds"] - found["median"]
    return {
        "seconds": [round(s, 4) for s in seconds],
        "cpu_seconds": [round(generation["cpu_seconds"], 4) for generation in generations],
        "summary": found,
        "compile_seconds": round(max(0.0, extra), 2),
        "step_seconds": [round(s, 5) for s in median_steps([g["steps"] for g in generations])],
        "peak_bytes": generations[-1]["peak_bytes"],
    }


def save(options: argparse.Namespace, content: dict[str, Any]) -> None:
    """Writes the results so far."""
    if options.out is not None:
        report.write_json(options.out, content)


def progress(text: str) -> None:
    """Shows the state of the run on one line of the terminal."""
    if sys.stderr.isatty():
        width = os.get_terminal_size(sys.stderr.fileno()).columns - 1
        print(f"\r{text[:width]:<{width}}", end="\r", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
