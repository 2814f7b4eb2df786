"""Formats how many calls plans need on finer grids, and where the floor is reached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import report
from pareto_points import CALIBRATED, FULL, GRID_FULL

Row = Mapping[str, Any]
AIM_SHARE = 0.36
"""Calls of a plan over those of the best sampler of the same accuracy."""
FLOOR = 40.0
"""PSNR in dB under which no plan should be taken."""


@dataclass(frozen=True)
class Grids:
    """The table of one model, and sentences on the calls that suffice."""

    model: str
    header: list[str]
    lines: list[list[str]]
    verdicts: list[str]


def list_grids(rows: Mapping[str, Row]) -> Iterator[Grids]:
    """Yields PSNR to the fine solution by calls, sampler and grid, for each model."""
    for model in dict.fromkeys(row["model"] for row in rows.values()):
        own = [row for row in rows.values() if row["model"] == model and "fine_psnr" in row]
        plans = [row for row in own if row["method"] == CALIBRATED.name]
        counts = sorted({row["allowed"] for row in plans})
        lines = [
            [f"{sampler} {grid}", *(_find_cell(plans, sampler, grid, count) for count in counts)]
            for sampler, grid in dict.fromkeys((row["sampler"], row["calls"]) for row in plans)
        ]
        full = [row for row in own if row["method"] == FULL]
        lines += [
            [f"{sampler}, as many steps", *(_find_full(full, sampler, count) for count in counts)]
            for sampler in dict.fromkeys(row["sampler"] for row in full)
        ]
        header = ["sampler and grid", *(f"{count} calls" for count in counts)]
        verdicts = [_find_calls(full, plans, calls) for calls in find_full_counts(full)]
        yield Grids(model, header, lines, verdicts)


def format_grids(rows: Mapping[str, Row]) -> str:
    """Returns the tables of all models as text."""
    return "\n".join(
        f"\n{found.model}: PSNR in dB to the fine solution, mean (worst)\n"
        + "\n".join([report.format_table(found.header, found.lines), *found.verdicts])
        for found in list_grids(rows)
    )


def find_full_counts(full: list[Row]) -> list[int]:
    """Returns the calls of the samplers whose accuracy has to be reached, most first."""
    wanted = [count for count in GRID_FULL if any(row["allowed"] == count for row in full)]
    return wanted or [max(row["allowed"] for row in full)]


def _find_calls(full: list[Row], plans: list[Row], calls: int) -> str:
    """Returns a sentence on the fewest calls with which a plan is as near as the best sampler."""
    best = max((r for r in full if r["allowed"] == calls), key=lambda row: row["fine_psnr"])
    target = best["fine_psnr"]
    text = f"best of {calls} calls: {best['sampler']}, {target:.1f} dB"
    enough = [row for row in plans if row["fine_psnr"] >= target]
    if not enough:
        most = max(plans, key=lambda row: row["fine_psnr"])
        return f"{text}; no plan reaches it: {_describe(most)}"
    found = min(enough, key=lambda row: (row["allowed"], -row["fine_psnr"]))
    share = found["allowed"] / calls
    word = "met" if share <= AIM_SHARE else "MISSED"
    return f"{text}; {_describe(found)}: {share:.2f} of them, aim {AIM_SHARE} {word}"


def _describe(row: Row) -> str:
    return (
        f"{row['allowed']} calls on {row['calls']} steps of {row['sampler']} give"
        f" {row['fine_psnr']:.1f} dB"
    )


def _find_cell(rows: list[Row], sampler: str, grid: int, count: int) -> str:
    for row in rows:
        if (row["sampler"], row["calls"], row["allowed"]) == (sampler, grid, count):
            return f"{row['fine_psnr']:.1f} ({row['fine_psnr_min']:.1f})"
    return ""


def _find_full(rows: list[Row], sampler: str, count: int) -> str:
    return next(
        (_find_cell([r], sampler, r["calls"], count) for r in rows if _is(r, sampler, count)), ""
    )


def _is(row: Row, sampler: str, count: int) -> bool:
    return bool(row["sampler"] == sampler and row["allowed"] == count)


def format_guidance(rows: Mapping[str, Row]) -> str:
    """Returns PSNR by speed for each scale and shift, and the fastest plan above the floor."""
    plans = [row for row in rows.values() if row["method"] == CALIBRATED.name and "psnr" in row]
    counts = sorted({row["allowed"] for row in plans}, reverse=True)
    lines = []
    for guidance, shift in dict.fromkeys((row["guidance"], row["shift"]) for row in plans):
        own = {r["allowed"]: r for r in plans if (r["guidance"], r["shift"]) == (guidance, shift)}
        cells = [f"{own[c]['psnr']:.1f} ({own[c]['psnr_min']:.1f})" for c in counts if c in own]
        floors = [find_floor(list(own.values()), key) for key in ("psnr", "psnr_min")]
        lines.append([f"guidance {guidance:g}, shift {shift:g}", *cells, *floors])
    calls = plans[0]["num_calls"] if plans else 0
    header = ["setup", *(f"{calls / count:.2f}x ({count})" for count in counts)]
    header += [f"mean above {FLOOR:.0f} dB to", "worst clip to"]
    return report.format_table(header, lines)


def find_floor(rows: list[Row], key: str) -> str:
    """Returns the speed up to which all plans are above the floor."""
    reached = 1.0
    for row in sorted(rows, key=lambda row: -row["allowed"]):
        if row[key] < FLOOR:
            break
        reached = row["num_calls"] / row["allowed"]
    return f"{reached:.2f}x"
