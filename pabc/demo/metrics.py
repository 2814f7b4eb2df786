"""Computes the figures of the variants: speed, fidelity, accuracy, memory; and warns of doubt."""

from __future__ import annotations

import datetime
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import pabc
from pabc.api import CompiledModel
from pabc.demo import judge
from pabc.demo.timing import Round, Run, Variant
from pabc.explanation import Explanation
from pabc.plan import Plan

FULL = "full"
TORCH_COMPILE = "torch.compile"
MAX_SPREAD = 0.25
MIN_ACCURACY = 0.9
MIN_COMPILED_PSNR = 40.0


def measure(
    variants: Sequence[Variant], runs: Mapping[str, Run], rounds: Sequence[Round]
) -> dict[str, dict[str, Any]]:
    """Returns the figures of each variant; a figure without a finite value is None."""
    captions = [caption for batch in rounds for caption in batch.captions]
    referee, full = judge.Judge(), runs[FULL].clips
    table = {}
    for variant in variants:
        run = runs[variant.name]
        per_clip = [seconds / len(rounds[0].captions) for seconds in run.seconds]
        similarity = judge.psnr(run.clips, full)
        table[variant.name] = {
            "about": variant.about,
            "seconds_per_clip": {
                "median": statistics.median(per_clip),
                "min": min(per_clip),
                "max": max(per_clip),
            },
            "speedup_vs_eager": _speedup(runs[FULL], run),
            "speedup_vs_torch_compile": _speedup(runs[TORCH_COMPILE], run),
            "psnr": _finite(similarity.mean()),
            "psnr_min": _finite(similarity.min()),
            "ssim": _finite(judge.ssim(run.clips, full).mean()),
            **referee.accuracy(run.clips, captions),
            "compile_seconds": run.compile_seconds if variant.is_compiled else 0.0,
            **_describe_plan(variant.transformer),
        }
    return table


def _speedup(reference: Run, run: Run) -> float:
    return statistics.median(reference.seconds) / statistics.median(run.seconds)


def _finite(value: torch.Tensor) -> float | None:
    return float(value) if math.isfinite(value) else None


def _describe_plan(transformer: Any) -> dict[str, Any]:
    if not isinstance(transformer, CompiledModel):
        return {"cache_bytes": 0, "phases": 0, "schedule": None, "flop_share": 1.0}
    return {
        "cache_bytes": transformer.plan.peak_bytes,
        "phases": len(transformer.plan.phases),
        "schedule": transformer.schedule.label,
        "flop_share": sum(flop_shares(transformer.plan, transformer.explain()))
        / transformer.plan.num_steps,
    }


def flop_shares(plan: Plan, explanation: Explanation) -> list[float]:
    """Returns, for each step, the share of the full model's floating-point operations that runs."""
    flops = torch.tensor([region.flops for region in explanation.regions], dtype=torch.float64)
    skipped = torch.from_numpy(plan.reuse.astype("float64")) @ flops
    return (1 - skipped / max(1, sum(explanation.flops.values()))).tolist()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Returns the device, the versions and the date of the measurement."""
    import diffusers

    return {
        "device": _name_device(device),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "pabc": pabc.__version__,
        "torch": str(torch.__version__),
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _name_device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.machine()})" if device.type == "cpu" else str(device)


def find_busy_machine() -> list[str]:
    """Returns a warning if other processes keep the CPUs busy."""
    cpus = os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load <= cpus / 2:
        return []
    return [f"the machine is busy (load {load:.1f} on {cpus} CPUs): timings will be off"]


def find_concerns(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns warnings about figures that may be unreliable."""
    concerns = []
    spreads = {name: _spread(row["seconds_per_clip"]) for name, row in table.items()}
    wide = [f"{name} {spread:.0%}" for name, spread in spreads.items() if spread > MAX_SPREAD]
    if wide:
        concerns.append(
            f"timings spread widely, in shares of the median: {', '.join(wide)}; is other work"
            " running?"
        )
    for what in ("digit_accuracy", "direction_accuracy"):
        if table[FULL][what] < MIN_ACCURACY:
            concerns.append(
                f"the full model's {what.replace('_', ' ')} is {table[FULL][what]:.0%}, expected"
                f" at least {MIN_ACCURACY:.0%}: what the others lose against it says little"
            )
    compiled = table[TORCH_COMPILE]["psnr"]
    if compiled is not None and compiled < MIN_COMPILED_PSNR:
        concerns.append(f"torch.compile of the full model is off: PSNR {compiled:.1f} dB")
    return concerns


def _spread(seconds: Mapping[str, float]) -> float:
    return (seconds["max"] - seconds["min"]) / seconds["median"]


def format_table(table: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows of the table in the terminal and in the report."""
    header = ["variant", "s/clip", "min-max", "vs eager", "vs torch.compile", "PSNR dB", "SSIM"]
    header += ["digit", "direction", "cache", "compile s", "phases", "FLOPs"]
    return header, [_format_row(name, row) for name, row in table.items()]


def _format_row(name: str, row: Mapping[str, Any]) -> list[str]:
    seconds = row["seconds_per_clip"]
    return [
        name,
        f"{seconds['median']:.3f}",
        f"{seconds['min']:.3f}-{seconds['max']:.3f}",
        f"{row['speedup_vs_eager']:.2f}x",
        f"{row['speedup_vs_torch_compile']:.2f}x",
        "equal" if row["psnr"] is None else f"{row['psnr']:.1f}",
        f"{row['ssim']:.4f}",
        f"{row['digit_accuracy']:.1%}",
        f"{row['direction_accuracy']:.1%}",
        f"{row['cache_bytes'] / 2**20:.1f} MiB" if row["cache_bytes"] else "-",
        f"{row['compile_seconds']:.1f}" if row["compile_seconds"] else "-",
        f"{row['phases'] or '-'}",
        f"{row['flop_share']:.0%}",
    ]
