"""Formats the results of `peers.py`: a table per model, and its conclusions."""

from __future__ import annotations

from typing import Any

import report
from variants import VARIANTS

HEADER = (
    "variant",
    "s / generation",
    "over eager",
    "over torch.compile",
    "PSNR",
    "SSIM",
    "attentions",
    "prepare s",
    "graphs",
    "recompiles",
    "since warm-up",
    "limit hits",
)
SAME_WORK = [name for name, variant in VARIANTS.items() if variant.follows_schedule]
"""Those that compute what pabc's plan computes."""
SKIPS = [name for name, variant in VARIANTS.items() if variant.skips_calls]
"""Those that compute equally many calls, and skip the others."""
Row = dict[str, Any]


def format_model(name: str, model: dict[str, Any]) -> str:
    """Returns the table of one model, and the times by phase of variants with pabc's schedule."""
    rows: dict[str, Row] = model["rows"]
    plan = next((rows[name] for name in SAME_WORK if "phases" in rows.get(name, {})), None)
    facts = [f"latents {model['latents']}, text {model['text']}"]
    facts += [] if model["is_trained"] else ["random weights: PSNR and SSIM only tell equality"]
    if plan:
        facts.append(
            f"{plan['gflops']:.1f} GFLOP a step, {plan['attention_share']:.0%} in attention"
            f" branches; {plan['flop_share']:.0%} of all still run at this schedule,"
            f" {plan['planned_attentions']} of"
            f" {plan['attentions_per_step'] * len(plan['phases'])} attentions"
        )
    cells = [format_row(variant, row, rows) for variant, row in rows.items() if "summary" in row]
    parts = [f"\n{name}: {'; '.join(facts)}", report.format_table(HEADER, cells)]
    parts += format_notes(rows)
    if plan:
        parts += [format_phases(rows, plan["phases"]), *format_verdict(rows)]
    if any(name in rows for name in SKIPS):
        parts.append(format_skips(rows))
    return "\n".join(parts)


def format_row(variant: str, row: Row, rows: dict[str, Row]) -> list[object]:
    """Returns the cells of one variant."""
    has_dynamo = bool(row.get("graphs"))
    return [
        variant,
        report.format_spread(row["summary"]),
        *(format_ratio(rows, other, variant) for other in ("eager", "torch.compile")),
        "equal" if row["is_equal"] else row["psnr"] if row["is_finite"] else "not finite",
        row["ssim"],
        row["attentions"],
        row["compile_seconds"],
        # pabc's graphs are its phases, which do not go through Dynamo.
        row.get("graphs") or row.get("compiles") or None,
        *(row[key] if has_dynamo else None for key in ("recompiles", "recompiles_later")),
        row.get("limit_hits") or None,
    ]


def format_notes(rows: dict[str, Row]) -> list[str]:
    """Returns the errors of variants that do not run, and the notes of the others."""
    lines = []
    for variant, row in rows.items():
        if "error" in row:
            lines.append(f"{variant}: does not run: {row['error']}")
        elif row.get("note"):
            lines.append(f"{variant}: {row['note']}")
    return lines


def find_ratio(rows: dict[str, Row], other: str, variant: str) -> float | None:
    """Returns the speedup of a variant over another."""
    first, second = (rows.get(name, {}).get("summary") for name in (other, variant))
    return first["median"] / second["median"] if first and second else None


def format_ratio(rows: dict[str, Row], other: str, variant: str) -> str | None:
    """Returns the speedup as text, for the table."""
    ratio = find_ratio(rows, other, variant)
    return None if ratio is None else f"{ratio:.2f}x"


def format_phases(rows: dict[str, Row], phases: list[int]) -> str:
    """Returns milliseconds per step, by phase of pabc's plan, of variants with the same work."""
    order = sorted(set(phases))
    header = ["ms a step, by phase of the plan", *(f"{p} (x{phases.count(p)})" for p in order)]
    lines = []
    for name in ("eager", "torch.compile", *SAME_WORK):
        steps = rows.get(name, {}).get("step_seconds")
        if steps:
            groups = [[s for s, p in zip(steps, phases, strict=True) if p == i] for i in order]
            lines.append([name, *(f"{1e3 * sum(group) / len(group):.1f}" for group in groups)])
    return report.format_table(header, lines)


def format_skips(rows: dict[str, Row]) -> str:
    """Returns the table of variants with equally many computed calls, the most similar first."""
    full = rows["eager"]["attentions"]
    found = [name for name in SKIPS if "summary" in rows.get(name, {})]
    header = ("equally many computed calls", "of all attentions", "over eager")
    lines = [
        [name, f"{rows[name]['attentions'] / full:.0%}", format_ratio(rows, "eager", name)]
        + [rows[name]["psnr"], rows[name]["psnr_min"]]
        for name in sorted(found, key=lambda name: -(rows[name]["psnr"] or float("inf")))
    ]
    return report.format_table((*header, "PSNR", "of the worst clip"), lines)


def format_verdict(rows: dict[str, Row]) -> list[str]:
    """Returns pabc's speedup over the best peer with the same schedule; names those that differ."""
    peers = [name for name in SAME_WORK if "pabc" not in name and rows.get(name, {}).get("summary")]
    lines = []
    if peers and rows.get("pabc", {}).get("summary"):
        best = min(peers, key=lambda name: rows[name]["summary"]["median"])
        ratio = format_ratio(rows, best, "pabc")
        lines.append(f"pabc over the best peer at the same schedule, {best}: {ratio}")
    planned = {
        rows[name]["planned_attentions"]
        for name in SAME_WORK
        if "planned_attentions" in rows.get(name, {})
    }
    for name in SAME_WORK:
        found = rows.get(name, {}).get("attentions")
        if found is not None and {found} != planned:
            lines.append(f"{name}: {found} attentions ran, planned: {planned}")
    return lines
