"""Writes the demo's files: figures, pictures and the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pabc
from pabc.api import CompiledModel
from pabc.demo import charts, pictures, report
from pabc.demo.model import FRACTION, Model
from pabc.demo.timing import Round, Run, Variant
from pabc.demo.variants import FULL
from pabc.demo.worst import save_worst

FILES = ("metrics.json", "clips.gif", "clips.png", "worst.png", "report.html")
"""The files that are written: no `clips.gif` of pictures that do not move, and no `worst.png` where
nothing is left out, as of one step."""


def write(
    out: Path,
    model: Model,
    content: Mapping[str, Any],
    *,
    method: str,
    variants: Sequence[Variant],
    runs: Mapping[str, Run],
    rounds: Sequence[Round],
    curves: charts.Curves,
    calibration: pabc.Calibration | None,
) -> tuple[str, ...]:
    """Writes the files, and returns their names.

    Args:
        out: the folder.
        model: what makes pictures of samples.
        content: the content of `metrics.json`.
        method: a description of how the figures were measured.
        variants: what was compared.
        runs: what the variants generated.
        rounds: the captions of that.
        curves: differences from step to step, see `pabc.differences`.
        calibration: the plans of the calibrated variants; None: there are none.
    """
    (out / "metrics.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    shown = _save_pictures(out, model, content, variants, runs)
    has_worst = save_worst(out / "worst.png", model, content["variants"], runs, rounds)
    page = report.render(
        content,
        method=method,
        pictures={name: (out / name).read_bytes() for name in shown},
        worst=(out / "worst.png").read_bytes() if has_worst else None,
        plans={
            v.name: (v.transformer.plan, v.transformer.explain())
            for v in variants
            if isinstance(v.transformer, CompiledModel)
        },
        curves=curves,
        window=(FRACTION[0] * content["steps"], FRACTION[1] * content["steps"]),
        calibration=calibration,
    )
    (out / "report.html").write_text(page, encoding="utf-8")
    return ("metrics.json", *shown, *(("worst.png",) if has_worst else ()), "report.html")


def _save_pictures(
    out: Path,
    model: Model,
    content: Mapping[str, Any],
    variants: Sequence[Variant],
    runs: Mapping[str, Run],
) -> tuple[str, ...]:
    """Writes what was generated in the first round, and returns the names of the files."""
    columns = [
        pictures.Column(
            v.name, _note(content["variants"][v.name]), model.pictures(runs[v.name].batches[0])
        )
        for v in variants
        if v.name == FULL or v.whole != v.name  # the others look like the first
    ]
    pictures.save_still(out / "clips.png", content["prompts"], columns)
    if columns[0].frames.shape[1] == 1:
        return ("clips.png",)
    pictures.save_gif(out / "clips.gif", content["prompts"], columns)
    return ("clips.gif", "clips.png")


def _note(row: Mapping[str, Any]) -> str:
    if row["psnr"] is None:
        return f"{row['calls']} calls"
    return f"{row['speedup_by_less_work']:.2f}x, {row['psnr']:.0f} dB"
