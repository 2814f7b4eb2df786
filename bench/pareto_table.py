"""Formats the rows of `pareto.py` as tables, and the margins that its aims are about."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import report

Row = Mapping[str, Any]
OWN = "pabc calibrated"
FEWER = "fewer steps"
MARGIN_SPEEDS = (1.5, 2.0, 3.0)
AIM_MARGIN = 6.0
"""dB above the best peer, and above fewer steps of any sampler."""
AIMS = {
    ("digits", "DDIM", 50): {1.5: 71.0, 2.0: 68.0, 3.0: 57.0},
    ("digits", "DDIM", 25): {2.0: 55.0},
    ("emoji", "Euler", 28): {1.5: 70.0, 2.0: 62.0, 2.8: 50.0},
}
"""Mean PSNR in dB to the full run, by speed."""
AIM_WORST = 48.0
"""PSNR in dB of the worst clip at 2x."""


def name_setup(row: Row) -> str:
    """Returns the setup of a row."""
    extra = [f", {k} {row[k]:g}" for k in ("guidance", "shift") if row.get(k) is not None]
    return f"{row['model']}, {row['sampler']} {row['num_calls']}{''.join(extra)}"


def group(rows: Mapping[str, Row]) -> dict[str, list[Row]]:
    """Returns setup -> its rows."""
    found: dict[str, list[Row]] = {}
    for row in rows.values():
        found.setdefault(name_setup(row), []).append(row)
    return found


def find_speed(row: Row) -> float:
    """Returns the speed that a row was allowed: all calls over those that it may cost."""
    return float(row["num_calls"] / row["allowed"])


def format_tables(rows: Mapping[str, Row]) -> str:
    """Returns a table per setup and yardstick, with margins and aims."""
    parts = []
    for name, own in group(rows).items():
        parts += [f"\n{name}: PSNR in dB to the full run, mean (worst)", format_setup(own, "")]
        full = next((row for row in own if row["method"] == "full"), None)
        if full is not None and "fine_psnr" in full:
            about = f"the full run: {format_cell(full, 'fine_')}"
            parts += [f"\n{name}: to the fine solution; {about}", format_setup(own, "fine_")]
        parts += [*list_verdicts(own), *list_failures(own)]
    return "\n".join(parts)


def find_counts(rows: Iterable[Row]) -> list[int]:
    """Returns the numbers of calls that methods were allowed, most first."""
    return sorted({row["allowed"] for row in rows if row["method"] != "full"}, reverse=True)


def format_documents(rows: Mapping[str, Row]) -> str:
    """Returns the tables of the first setup as Markdown, with what its aims came to."""
    name, own = next(iter(group(rows).items()))
    full = next(row for row in own if row["method"] == "full")
    fine = f"{name}, to the fine solution; the full run: {format_cell(full, 'fine_')}:"
    parts = [f"{name}, PSNR in dB to the full run, mean (worst clip):"]
    parts += [report.format_markdown(*make_table(own, "")), fine]
    parts += [report.format_markdown(*make_table(own, "fine_"))]
    verdicts = [line for each in group(rows).values() for line in list_verdicts(each)]
    parts += ["\n".join(f"- {line}" for line in verdicts)]
    return "\n\n".join(parts)


def format_setup(rows: Sequence[Row], prefix: str) -> str:
    """Returns the table of one setup: a line per method, a column per number of calls."""
    return report.format_table(*make_table(rows, prefix))


def make_table(rows: Sequence[Row], prefix: str) -> tuple[list[str], list[list[str]]]:
    """Returns header and lines of the table of one setup."""
    num_calls = rows[0]["num_calls"]
    counts = [count for count in find_counts(rows) if count < num_calls]
    cells = {(row["method"], row["allowed"]): row for row in rows}
    header = ["method", *(f"{num_calls / c:.2f}x ({c})" for c in counts)]
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] != "full"):
        line = [format_cell(cells.get((method, count)), prefix) for count in counts]
        fixed = cells.get((method, num_calls))
        if fixed is not None and "psnr" in fixed:
            line = [f"{format_cell(fixed, prefix)} @{1 / fixed['share']:.2f}x", *[""] * len(counts)]
            line = line[: len(counts)]
        lines.append([method, *line])
    return header, lines


def format_cell(row: Row | None, prefix: str) -> str:
    """Returns mean and worst PSNR; a note where there is none."""
    if row is None:
        return ""
    if "psnr" not in row:
        return "-" if "not_reached" in row else "fails"
    return f"{row[prefix + 'psnr']:.1f} ({row[prefix + 'psnr_min']:.1f})"


def find_best(rows: Iterable[Row], allowed: int, methods: Sequence[str]) -> Row | None:
    """Returns the best row that costs no more calls, of methods whose names begin so."""
    found = [
        row
        for row in rows
        if row["allowed"] <= allowed and "psnr" in row and row["method"].startswith(tuple(methods))
    ]
    return max(found, key=lambda row: row["psnr"], default=None)


def list_verdicts(rows: Sequence[Row]) -> list[str]:
    """Returns a line per speed: the margins over peers and fewer steps, and the aim."""
    num_calls = rows[0]["num_calls"]
    aims = AIMS.get((rows[0]["model"], rows[0]["sampler"], num_calls), {})
    peers = [
        method
        for method in dict.fromkeys(row["method"] for row in rows)
        if method != "full" and not method.startswith(("pabc", FEWER))
    ]
    lines = []
    for speed in sorted({*MARGIN_SPEEDS, *aims}):
        allowed = round(num_calls / speed)
        own = next((r for r in rows if r["method"] == OWN and r["allowed"] == allowed), None)
        if own is None or "psnr" not in own or rows[0].get("guidance") or rows[0].get("shift"):
            continue
        found = f"{own['psnr']:.1f} ({own['psnr_min']:.1f})"
        words = [f"{name_setup(own)}, {speed:g}x, {allowed} calls: {found}"]
        if speed in aims:
            words.append(f"aim {aims[speed]:.0f} {mark(own['psnr'] >= aims[speed])}")
        if aims and speed == 2.0:
            words.append(f"worst {mark(own['psnr_min'] >= AIM_WORST)}")
        for name, methods in (("best peer", peers), (FEWER, [FEWER])):
            other = find_best(rows, allowed, methods) if methods else None
            if other is not None:
                gain = own["psnr"] - other["psnr"]
                who = other["method"].removeprefix("fewer steps, ")
                words.append(f"{gain:+.1f} dB to {name}, {who} {mark(gain >= AIM_MARGIN)}")
        lines.append("; ".join(words))
    return lines


def mark(is_met: bool) -> str:
    """Returns a word on an aim."""
    return "met" if is_met else "MISSED"


def list_failures(rows: Iterable[Row]) -> list[str]:
    """Returns a line per method that raised an error."""
    found = {row["method"]: row["error"] for row in rows if "error" in row}
    return [f"{method}: does not run: {error}" for method, error in found.items()]


def correlate(rows: Iterable[Row]) -> dict[str, float] | None:
    """Returns how predicted and measured PSNR agree: number, correlation, misses in dB."""
    pairs = [
        (row["predicted"], row["psnr"])
        for row in rows
        if row.get("predicted") is not None and "psnr" in row and row["psnr"] < 149
    ]
    if len(pairs) < 3:
        return None
    xs, ys = zip(*pairs, strict=True)
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    product = sum((x - mean_x) * (y - mean_y) for x, y in pairs)
    sizes = sum((x - mean_x) ** 2 for x in xs) * sum((y - mean_y) ** 2 for y in ys)
    misses = [y - x for x, y in pairs]
    return {
        "plans": len(pairs),
        "correlation": product / math.sqrt(sizes) if sizes else math.nan,
        "mean_miss": sum(misses) / len(misses),
        "largest_miss": max(misses, key=abs),
        "most_optimistic": min(misses),
    }
