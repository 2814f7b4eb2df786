"""Draws a frontier as SVG: PSNR over speedup, and which steps the taken plan computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from pabc.calibration.candidates import Candidate
from pabc.calibration.frontier import FrontierRow

WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 14, 84
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #444 }
.grid { stroke: #ddd } .floor { stroke: #d55e00; stroke-dasharray: 5 4 }
.predicted { fill: none; stroke: #0072b2; stroke-width: 1.5; stroke-dasharray: 2 3 }
.measured { fill: #0072b2 } .taken { fill: none; stroke: #0072b2; stroke-width: 2 }
.range { stroke: #0072b2 } .compute { fill: #4b4b4b } .skip { fill: #dce6ee }
.background { fill: #fff }
"""
Scale = Callable[[float], float]


def draw(rows: Sequence[FrontierRow], taken: Candidate, floor: float) -> str:
    """Returns the text of an SVG file.

    Dots are measured plans, with a line to the worst seed; the dotted line is what is predicted.
    """
    shown = [row for row in rows if math.isfinite(row.decibels)]
    parts = [f'<rect class="background" width="{WIDTH}" height="{HEIGHT}"/>']
    if shown:
        x_of = _scale([row.speedup for row in shown], LEFT, WIDTH - RIGHT, least=1.0)
        values = [row.decibels for row in shown]
        values += [row.worst for row in shown if row.worst is not None]
        y_of = _scale([*values, floor], HEIGHT - BOTTOM, TOP)
        parts += _draw_grid(x_of, y_of, shown)
        parts.append(_line(LEFT, y_of(floor), WIDTH - RIGHT, y_of(floor), "floor"))
        parts.append(_text(WIDTH - RIGHT, y_of(floor) - 5, f"floor {floor:g} dB", "end"))
        points = " ".join(f"{x_of(r.speedup):.1f},{y_of(r.decibels):.1f}" for r in shown)
        parts.append(f'<polyline class="predicted" points="{points}"/>')
        for row in shown:
            if row.measured is not None:
                parts += _draw_measured(row, x_of, y_of, is_taken=row.candidate == taken)
    parts += _draw_steps(taken)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img"><title>PSNR by speedup</title>'
    )
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>\n"])


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
        if TOP - 1 <= y <= HEIGHT - BOTTOM + 1:
            parts.append(_line(LEFT, y, WIDTH - RIGHT, y, "grid"))
            parts.append(_text(LEFT - 6, y + 4, f"{decibels}", "end"))
    fastest = max(row.speedup for row in rows)
    step = 0.25 if fastest < 2.5 else 0.5 if fastest < 6 else 2
    for i in range(int((fastest - 1) / step) + 1):
        speedup = 1 + i * step
        parts.append(_text(x_of(speedup), HEIGHT - BOTTOM + 16, f"{speedup:g}x", "middle"))
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


def _draw_steps(taken: Candidate) -> list[str]:
    n, computed = len(taken.weights), set(taken.computed)
    width = (WIDTH - LEFT - RIGHT) / n
    y = HEIGHT - 40
    parts = []
    for step, weights in enumerate(taken.weights):
        does = "computes" if step in computed else f"forecasts by {_format(weights)}"
        name = "compute" if step in computed else "skip"
        parts.append(
            f'<rect class="{name}" x="{LEFT + step * width:.2f}" y="{y}" '
            f'width="{max(width - 1, 0.5):.2f}" height="16">'
            f"<title>step {step} {does}</title></rect>"
        )
    parts.append(_text(LEFT - 6, y + 12, "plan", "end"))
    parts.append(_text(LEFT, y + 32, "step 0", "start"))
    parts.append(_text(WIDTH - RIGHT, y + 32, f"step {n - 1}", "end"))
    shown = f"{len(computed)} of {n} steps computed: {taken.name}"
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, y + 32, shown, "middle"))
    return parts


def _format(weights: Sequence[float]) -> str:
    return ", ".join(f"{weight:.3g}" for weight in weights)


def _line(x1: float, y1: float, x2: float, y2: float, name: str) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line class="{name}" {ends}/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
