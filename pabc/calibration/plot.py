"""Draws a frontier as SVG: PSNR over speedup, and which steps the plans compute that are taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from pabc.calibration.candidates import Candidate
from pabc.calibration.frontier import FrontierRow

WIDTH, LEFT, RIGHT, TOP = 720, 52, 18, 14
BOTTOM = 296
"""The positions at which the chart ends, and its labels and the plans begin."""
ROW = 34
"""The height of a plan."""
FASTEST = 4.0
"""The speedup up to which rows are shown, if no faster plan was measured."""
STYLE = "\n".join(
    f".frontier {rule}"  # leaves the rest of a page that includes the chart as it is
    for rule in (
        "text { font: 12px system-ui, sans-serif; fill: #444 }",
        ".grid { stroke: #ddd }",
        ".floor { stroke: #d55e00; stroke-dasharray: 5 4 }",
        ".predicted { fill: none; stroke: #0072b2; stroke-width: 1.5; stroke-dasharray: 2 3 }",
        ".measured { fill: #0072b2 }",
        ".taken { fill: none; stroke: #0072b2; stroke-width: 2 }",
        ".range { stroke: #0072b2 }",
        ".compute { fill: #4b4b4b }",
        ".skip { fill: #dce6ee }",
        ".background { fill: #fff }",
    )
)
Scale = Callable[[float], float]


def draw(rows: Sequence[FrontierRow], taken: Sequence[Candidate], floor: float) -> str:
    """Returns the text of an SVG file.

    Dots are measured plans, with a line to the worst seed; the dotted line is what is predicted
    between them. Below, a row of steps for each plan in `taken`.
    """
    shown = [row for row in rows if math.isfinite(row.decibels)]
    fastest = max([FASTEST, *(row.speedup for row in shown if row.measured is not None)])
    shown = [row for row in shown if row.speedup <= fastest]
    plans = list(dict.fromkeys(taken))
    height = BOTTOM + 44 + ROW * len(plans)
    parts = [f'<rect class="background" width="{WIDTH}" height="{height}"/>']
    if shown:
        parts += _draw_chart(shown, plans, floor)
    speedups = {row.candidate: row.speedup for row in rows}
    for i, plan in enumerate(plans):
        label = f"{speedups[plan]:.2f}x" if plan in speedups else "plan"
        parts += _draw_steps(plan, label, BOTTOM + 32 + i * ROW)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" class="frontier" role="img">'
        "<title>PSNR by speedup</title>"
    )
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>\n"])


def _draw_chart(rows: Sequence[FrontierRow], taken: Sequence[Candidate], floor: float) -> list[str]:
    x_of = _scale([row.speedup for row in rows], LEFT, WIDTH - RIGHT, least=1.0)
    values = [row.decibels for row in rows]
    values += [row.worst for row in rows if row.worst is not None]
    y_of = _scale([*values, floor], BOTTOM, TOP)
    parts = _draw_grid(x_of, y_of, rows)
    parts.append(_line(LEFT, y_of(floor), WIDTH - RIGHT, y_of(floor), "floor"))
    parts.append(_text(LEFT + 6, y_of(floor) - 5, f"floor {floor:g} dB", "start"))
    points = " ".join(f"{x_of(r.speedup):.1f},{y_of(r.decibels):.1f}" for r in rows)
    parts.append(f'<polyline class="predicted" points="{points}"/>')
    for row in rows:
        if row.measured is not None:
            parts += _draw_measured(row, x_of, y_of, is_taken=row.candidate in taken)
    return parts


def _scale(
    values: Sequence[float], start: float, end: float, *, least: float | None = None
) -> Scale:
    low = min(values) if least is None else least
    size = max(max(values) - low, 1e-9)
    return lambda value: start + (value - low) / size * (end - start)


def _draw_grid(x_of: Scale, y_of: Scale, rows: Sequence[FrontierRow]) -> list[str]:
    values = [row.decibels for row in rows]
    parts = []
    for decibels in range(0, math.ceil(max(values)) + 10, 10):
        y = y_of(decibels)
        if TOP - 1 <= y <= BOTTOM + 1:
            parts.append(_line(LEFT, y, WIDTH - RIGHT, y, "grid"))
            parts.append(_text(LEFT - 6, y + 4, f"{decibels}", "end"))
    fastest = max(row.speedup for row in rows)
    step = 0.25 if fastest < 2.5 else 0.5 if fastest < 6 else 2
    for i in range(int((fastest - 1) / step) + 1):
        speedup = 1 + i * step
        parts.append(_text(x_of(speedup), BOTTOM + 16, f"{speedup:g}x", "middle"))
    parts.append(_text(LEFT - 40, TOP + 4, "dB", "start"))
    return parts


def _draw_measured(row: FrontierRow, x_of: Scale, y_of: Scale, *, is_taken: bool) -> list[str]:
    assert row.measured is not None and row.worst is not None
    x, y = x_of(row.speedup), y_of(row.measured)
    title = (
        f"{row.speedup:.2f}x, {row.computed} computed steps, {row.measured:.1f} dB "
        f"(worst {row.worst:.1f}), {row.name}"
    )
    parts = [_line(x, y, x, y_of(row.worst), "range")]
    dot = f'<circle class="measured" cx="{x:.1f}" cy="{y:.1f}" r="4">'
    parts.append(f"{dot}<title>{escape(title)}</title></circle>")
    if is_taken:
        parts.append(f'<circle class="taken" cx="{x:.1f}" cy="{y:.1f}" r="8"/>')
    return parts


def _draw_steps(plan: Candidate, label: str, y: float) -> list[str]:
    n, computed = len(plan.weights), set(plan.computed)
    width = (WIDTH - LEFT - RIGHT) / n
    parts = []
    for step, weights in enumerate(plan.weights):
        does = "computes" if step in computed else f"forecasts by {_format(weights)}"
        name = "compute" if step in computed else "skip"
        parts.append(
            f'<rect class="{name}" x="{LEFT + step * width:.2f}" y="{y}" '
            f'width="{max(width - 1, 0.5):.2f}" height="13">'
            f"<title>step {step} {does}</title></rect>"
        )
    parts.append(_text(LEFT - 6, y + 11, label, "end"))
    parts.append(_text(LEFT, y + 26, f"{len(computed)} of {n} steps, {plan.name}", "start"))
    return parts


def _format(weights: Sequence[float]) -> str:
    return ", ".join(f"{weight:.3g}" for weight in weights)


def _line(x1: float, y1: float, x2: float, y2: float, name: str) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line class="{name}" {ends}/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
