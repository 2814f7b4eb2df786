"""Computes the figures of the variants: work, speed, fidelity, accuracy, memory; warns of doubt.

What a variant's speedup over torch.compile consists of is kept apart: what comes from less work,
which is much the same on all machines, and what comes from other code for the same work, which
depends on the machine's libraries.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pabc.api import CompiledModel
from pabc.base.kinds import COARSE
from pabc.demo import judge
from pabc.demo.model import Model, to_unit
from pabc.demo.timing import Round, Run, Variant
from pabc.demo.variants import FULL, TORCH_COMPILE
from pabc.explanation import Explanation
from pabc.plan import Plan

MAX_SPREAD = 0.25
MIN_ACCURACY = 0.9
MIN_COMPILED_PSNR = 40.0
ACCURACY = "_accuracy"
"""The end of the keys of shares of samples that are right."""


def measure(
    model: Model,
    variants: Sequence[Variant],
    runs: Mapping[str, Run],
    rounds: Sequence[Round],
) -> dict[str, dict[str, Any]]:
    """Returns the figures of each variant; a figure without a finite value is None."""
    captions = [caption for batch in rounds for caption in batch.captions]
    full = to_unit(runs[FULL].samples)
    num_steps = next(variant.steps for variant in variants if variant.name == FULL)
    table = {}
    for variant in variants:
        run, whole = runs[variant.name], runs[variant.whole]
        samples = to_unit(run.samples)
        similarity = judge.psnr(samples, full)
        table[variant.name] = {
            "about": variant.about,
            "ranks": variant.ranks,
            **_describe_work(variant, num_steps),
            "whole": variant.whole,
            "speedup_by_less_work": _speedup(whole, run),
            "speedup_by_code": _speedup(runs[TORCH_COMPILE], whole),
            "speedup_vs_torch_compile": _speedup(runs[TORCH_COMPILE], run),
            "speedup_vs_eager": _speedup(runs[FULL], run),
            "seconds_per_clip": _summarize(run, len(rounds[0].captions)),
            "psnr": _finite(similarity.mean()),
            "psnr_min": _finite(similarity.min()),
            "worst_sample": int(similarity.argmin()),
            "ssim": _finite(judge.ssim(samples, full).mean()),
            **_judge(model, run.samples, captions),
            "compile_seconds": run.compile_seconds if variant.is_compiled else 0.0,
        }
    return table


def _judge(model: Model, samples: torch.Tensor, captions: list[str]) -> dict[str, float]:
    shares = model.judge(samples, captions)
    return {f"{what}{ACCURACY}": share for what, share in shares.items()}


def _find_shares(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns what is judged -> the share of samples that are right."""
    keys = [key for key in row if key.endswith(ACCURACY)]
    return {key.removesuffix(ACCURACY): row[key] for key in keys}


def _summarize(run: Run, num_clips: int) -> dict[str, float]:
    """Returns the seconds of one clip: median, least and most of the rounds."""
    per_clip = [seconds / num_clips for seconds in run.seconds]
    return {"median": statistics.median(per_clip), "min": min(per_clip), "max": max(per_clip)}


def _speedup(reference: Run, run: Run) -> float:
    return statistics.median(reference.seconds) / statistics.median(run.seconds)


def _finite(value: torch.Tensor) -> float | None:
    return float(value) if math.isfinite(value) else None


def _describe_work(variant: Variant, num_steps: int) -> dict[str, Any]:
    """Returns the calls that run something, and shares of the full model's calls and operations.

    The full model makes `num_steps` calls.
    """
    transformer = variant.transformer
    facts: dict[str, Any] = {"cache_bytes": 0, "phases": 0, "schedule": None}
    shares = [1.0] * variant.steps
    if isinstance(transformer, CompiledModel):
        plan = transformer.plan
        facts = {
            "cache_bytes": plan.peak_bytes,
            "phases": len(plan.phases),
            "schedule": transformer.schedule.label,
        }
        shares = flop_shares(plan, transformer.explain())
    ran = [t for t, share in zip(variant.timesteps, shares, strict=True) if share > 0]
    return {
        "steps": variant.steps,
        "calls": len(ran),
        "call_share": len(ran) / num_steps,
        "flop_share": sum(shares) / num_steps,
        "timesteps": ran,
        **facts,
    }


def flop_shares(plan: Plan, explanation: Explanation) -> list[float]:
    """Returns, for each step, the share of the full model's floating-point operations that runs."""
    flops: dict[str, list[int]] = {}
    for region in explanation.regions:
        flops.setdefault(region.kind, []).append(region.flops)
    fine = [j for j, slot in enumerate(plan.slots) if slot.kind not in COARSE]  # what others cover
    each = [flops[plan.slots[j].kind][plan.slots[j].layer] for j in fine]
    skipped = torch.from_numpy(~plan.computed[:, fine]).double() @ torch.tensor(each).double()
    shares = 1 - skipped / max(1, sum(explanation.flops.values()))
    models = [j for j, slot in enumerate(plan.slots) if slot.kind == "model"]
    is_skipped = torch.from_numpy(plan.reuse[:, models].any(axis=1))
    return shares.masked_fill(is_skipped, 0).tolist()


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
    for what, share in _find_shares(table[FULL]).items():
        if share < MIN_ACCURACY:
            concerns.append(
                f"the full model's {what} accuracy is {share:.0%}, expected"
                f" at least {MIN_ACCURACY:.0%}: what the others lose against it says little"
            )
    compiled = table[TORCH_COMPILE]["psnr"]
    if compiled is not None and compiled < MIN_COMPILED_PSNR:
        concerns.append(f"torch.compile of the full model is off: PSNR {compiled:.1f} dB")
    return concerns


def _spread(seconds: Mapping[str, float]) -> float:
    return (seconds["max"] - seconds["min"]) / seconds["median"]


def format_work(table: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of the table of work and quality: much the same on all machines."""
    header = ["variant", "calls", "FLOPs", "speedup by less work", "PSNR dB (worst)", "SSIM"]
    header += list(_find_shares(next(iter(table.values()))))
    return header, [
        [
            name,
            f"{row['calls']}",
            f"{row['flop_share']:.0%}",
            f"{row['speedup_by_less_work']:.2f}x",
            _format_psnr(row),
            f"{row['ssim']:.4f}",
            *(f"{share:.1%}" for share in _find_shares(row).values()),
        ]
        for name, row in table.items()
    ]


def format_time(table: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of the table of times, which depend on the machine."""
    header = ["variant", "s/clip", "min-max", "vs eager", "vs torch.compile", "= by less work"]
    header += ["x by other code", "cache", "compile s", "phases"]
    return header, [_format_times(name, row) for name, row in table.items()]


def _format_psnr(row: Mapping[str, Any]) -> str:
    if row["psnr"] is None:
        return "equal"
    worst = "" if row["psnr_min"] is None else f" ({row['psnr_min']:.1f})"
    return f"{row['psnr']:.1f}{worst}"


def _format_times(name: str, row: Mapping[str, Any]) -> list[str]:
    seconds = row["seconds_per_clip"]
    return [
        name,
        f"{seconds['median']:.3f}",
        f"{seconds['min']:.3f}-{seconds['max']:.3f}",
        f"{row['speedup_vs_eager']:.2f}x",
        f"{row['speedup_vs_torch_compile']:.2f}x",
        f"{row['speedup_by_less_work']:.2f}",
        f"{row['speedup_by_code']:.2f}",
        f"{row['cache_bytes'] / 2**20:.1f} MiB" if row["cache_bytes"] else "-",
        f"{row['compile_seconds']:.1f}" if row["compile_seconds"] else "-",
        f"{row['phases'] or '-'}",
    ]
