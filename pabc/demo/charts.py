"""Draws charts as inline SVG: a plan over its steps, and difference curves on a log scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import numpy.typing as npt

from pabc.base.kinds import KINDS
from pabc.plan import Action, Plan

COLORS = {
    "spatial": "#0072b2",
    "temporal": "#d55e00",
    "cross": "#009e73",
    "mlp": "#b0679a",
    "full": "#0072b2",
    "joint": "#e69f00",
    "other": "#7f7f7f",
    "block": "#56b4e9",
    "stack": "#8c6d31",
    "model": "#4b4b4b",
}
"""A color per kind, from a palette that is safe for color-blind readers."""
_CLASSES = {
    Action.COMPUTE: "compute",
    Action.STORE: "store",
    Action.REUSE: "reuse",
    Action.COVERED: "covered",
}
"""The style of a cell, from the page's style sheet."""
_WORDS = {
    Action.COMPUTE: "compute",
    Action.STORE: "compute and store",
    Action.REUSE: "reuse",
    Action.COVERED: "part of what is reused",
}
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Pairs = Mapping[str, tuple[float, float]]
"""Label -> predicted and measured dB."""
Curves = Mapping[str, npt.NDArray[np.float64]]
"""Kind -> [num_layers, num_steps - 1], from :meth:`pabc.differences.Differences.curves`."""


def draw_timeline(plan: Plan) -> str:
    """Returns the plan as a table of colored cells: a row per kind, a column per step."""
    left, top, height = 102, 6, 24
    width = max(5.0, min(26.0, 800 / plan.num_steps))
    rows = _group_rows(plan)
    parts = []
    for row, (label, slot) in enumerate(rows):
        y = top + row * (height + 3)
        parts.append(_text(left - 8, y + 16, label, "end"))
        for step, action in enumerate(plan.actions[:, slot]):
            parts.append(
                f'<rect x="{left + step * width:.1f}" y="{y}" width="{width - 1:.1f}"'
                f' height="{height}" class="{_CLASSES[Action(action)]}"><title>{label}, step'
                f" {step}, t = {plan.timesteps[step]:g}: {_describe_action(plan, step, slot)}"
                "</title></rect>"
            )
    y = top + len(rows) * (height + 3) + 14
    parts.append(_text(left - 8, y, "phase", "end"))
    for step, phase in enumerate(plan.phase_of_step):
        parts.append(_text(left + (step + 0.5) * width - 0.5, y, f"{phase}", "middle", "small"))
    parts.append(_text(left - 14, y + 20, "step", "end", "faint"))
    parts.append(_text(left - 14, y + 36, "timestep", "end", "faint"))
    for step in _ticks(plan.num_steps):
        x = left + (step + 0.5) * width
        parts.append(_text(x, y + 20, f"{step}", "middle", "faint"))
        parts.append(_text(x, y + 36, f"{plan.timesteps[step]:g}", "middle", "faint"))
    return _svg(left + plan.num_steps * width + 12, y + 44, parts, "plan")


def _describe_action(plan: Plan, step: int, slot: int) -> str:
    weights = plan.weights(step, slot)
    if weights in ((), (1.0,)):
        return _WORDS[Action(plan.actions[step, slot])]
    terms = [
        f"{weight:+.3g} of step {source}"
        for weight, source in zip(weights, plan.history(step, slot), strict=True)
    ]
    return f"forecast, {', '.join(terms)}"


def draw_calls(calls: Mapping[str, Sequence[float]]) -> str:
    """Returns the timesteps at which each variant calls the model: a row of marks per variant."""
    left, top, height, width = 122, 4, 18, 720
    first = max(map(max, calls.values()))
    parts = []
    for row, (name, timesteps) in enumerate(calls.items()):
        y = top + row * (height + 3)
        parts.append(_text(left - 8, y + 13, name, "end"))
        for t in timesteps:
            x = left + (1 - t / max(1, first)) * width
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="4" height="{height}" class="compute">'
                f"<title>{escape(name)}: t = {t:g}</title></rect>"
            )
        parts.append(_text(left + width + 14, y + 13, f"{len(timesteps)}", "start", "faint"))
    y = top + len(calls) * (height + 3) + 12
    for part in range(6):
        t = first * (5 - part) / 5
        parts.append(_text(left + part / 5 * width + 2, y, f"{t:.0f}", "middle", "faint"))
    parts.append(_text(left - 14, y, "timestep", "end", "faint"))
    return _svg(left + width + 44, y + 8, parts, "calls")


def draw_predictions(runs: Pairs, judged: Pairs) -> str:
    """Returns a chart of measured over predicted dB, in which right predictions are on a line.

    Args:
        runs: label -> predicted and measured dB of a plan, on the noise that was recorded: a dot.
        judged: the same on the samples that are judged: a ring.
    """
    size, left, bottom = 380, 44, 40
    points = [*runs.values(), *judged.values()]
    if not points:
        return ""
    low = 10 * math.floor(min(map(min, points)) / 10)
    high = max(low + 10, 10 * math.ceil(max(map(max, points)) / 10))

    def x_of(value: float) -> float:
        return left + (value - low) / (high - low) * (size - left - 12)

    def y_of(value: float) -> float:
        return size - bottom - (value - low) / (high - low) * (size - bottom - 12)

    parts = [f'<path d="M{x_of(low):.1f} {y_of(low):.1f}L{x_of(high):.1f} {y_of(high):.1f}"']
    parts[0] += ' class="grid"/>'
    for value in range(low, high + 1, 10 * math.ceil((high - low) / 100)):
        parts.append(f'<path d="M{left} {y_of(value):.1f}H{size - 12}" class="grid"/>')
        parts.append(_text(left - 6, y_of(value) + 4, f"{value}", "end", "faint"))
        parts.append(_text(x_of(value), size - bottom + 16, f"{value}", "middle", "faint"))
    parts.append(_text((left + size) / 2, size - 6, "predicted dB", "middle", "faint"))
    parts.append(_text(left + 6, 20, "measured dB", "start", "faint"))
    for name, radius, found in (("store", 4, runs), ("ring", 7, judged)):
        for label, (predicted, measured) in found.items():
            parts.append(
                f'<circle cx="{x_of(predicted):.1f}" cy="{y_of(measured):.1f}" r="{radius}"'
                f' class="{name}"><title>{escape(label)}: predicted {predicted:.1f} dB, measured'
                f" {measured:.1f} dB</title></circle>"
            )
    return _svg(size, size, parts, "predictions")


def draw_means(curves: Curves, window: tuple[float, float]) -> str:
    """Returns a chart of each kind's mean curve; `window`, a range of steps, is shaded."""
    means = {kind: curve.mean(axis=0, keepdims=True) for kind, curve in curves.items()}
    return _draw_panel(means, window, _decades(means), size=(880, 300), legend=True)


def draw_kinds(curves: Curves, window: tuple[float, float]) -> dict[str, str]:
    """Returns a chart per kind: thin lines for its layers, a bold one for their mean.

    All charts have the same axes.
    """
    decades = _decades(curves)
    return {
        kind: _draw_panel({kind: curve}, window, decades, size=(430, 210), legend=False)
        for kind, curve in curves.items()
    }


def _draw_panel(
    curves: Curves,
    window: tuple[float, float],
    decades: tuple[int, int],
    *,
    size: tuple[int, int],
    legend: bool,
) -> str:
    width, height = size
    left, right, top, bottom = 48, (92 if legend else 12), 10, 36
    num_steps = next(iter(curves.values())).shape[1] + 1

    def x_of(step: float) -> float:
        return left + step / max(1, num_steps - 1) * (width - left - right)

    def y_of(value: float) -> float:
        low, high = decades
        fraction = (math.log10(max(value, 10.0**low)) - low) / (high - low)
        return height - bottom - fraction * (height - top - bottom)

    start, end = x_of(window[0]), x_of(min(window[1], num_steps - 1))
    parts = [
        f'<rect x="{start:.1f}" y="{top}" width="{max(0.0, end - start):.1f}"'
        f' height="{height - top - bottom}" class="window"/>'
    ]
    for power in range(decades[0], decades[1] + 1):
        y = y_of(10.0**power)
        parts.append(f'<path d="M{left} {y:.1f}H{width - right}" class="grid"/>')
        label = f"10{str(power).translate(_SUPERSCRIPTS)}"
        parts.append(_text(left - 6, y + 4, label, "end", "faint"))
    for step in _ticks(num_steps):
        parts.append(_text(x_of(step), height - bottom + 16, f"{step}", "middle", "faint"))
    parts.append(_text((left + width - right) / 2, height - 4, "step", "middle", "faint"))
    for kind, curve in curves.items():
        thin = curve if len(curve) > 1 else curve[:0]
        lines = [("thin", line) for line in thin] + [("bold", curve.mean(axis=0))]
        for name, line in lines:
            points = [f"{x_of(i + 1):.1f} {y_of(float(v)):.1f}" for i, v in enumerate(line)]
            path = f'<path d="M{"L".join(points)}" class="{name}" stroke="{COLORS[kind]}">'
            parts.append(f"{path}<title>{kind}</title></path>")
    if legend:
        parts += _draw_legend(curves, width - right + 10, y_of)
    return _svg(width, height, parts, "differences")


def _draw_legend(curves: Curves, x: float, y_of: object) -> list[str]:
    """Returns the kinds' names at the right ends of their curves, spaced so that none overlap."""
    assert callable(y_of)
    ends = sorted((y_of(float(curve[:, -1].mean())) + 4, kind) for kind, curve in curves.items())
    parts, last = [], -math.inf
    for y, kind in ends:
        last = max(y, last + 16)
        parts.append(
            f'<text x="{x:.1f}" y="{last:.1f}" style="fill:{COLORS[kind]};font-weight:600">'
            f"{kind}</text>"
        )
    return parts


def _group_rows(plan: Plan) -> list[tuple[str, int]]:
    """Returns a label and one slot for each group of slots that have one kind and equal actions."""
    groups: dict[tuple[str, bytes], list[int]] = {}
    for slot, spec in enumerate(plan.slots):
        groups.setdefault((spec.kind, plan.actions[:, slot].tobytes()), []).append(slot)
    kinds = [kind for kind, _ in groups]
    rows = []
    for (kind, _), slots in sorted(groups.items(), key=lambda item: KINDS.index(item[0][0])):
        layers = [plan.slots[slot].layer for slot in slots]
        label = kind if kinds.count(kind) == 1 else f"{kind} {min(layers)}-{max(layers)}"
        rows.append((label, slots[0]))
    return rows


def _decades(curves: Curves) -> tuple[int, int]:
    """Returns the exponents of the powers of ten that enclose all positive values."""
    values = np.concatenate([curve.ravel() for curve in curves.values()])
    values = values[values > 0]
    if not len(values):
        return -1, 0
    low, high = math.floor(math.log10(values.min())), math.ceil(math.log10(values.max()))
    return low, max(high, low + 1)


def _ticks(num_steps: int) -> Sequence[int]:
    return range(0, num_steps, max(1, round(num_steps / 10)))


def _text(x: float, y: float, text: str, anchor: str, name: str = "label") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{name}">{escape(text)}</text>'
    )


def _svg(width: float, height: float, parts: Sequence[str], label: str) -> str:
    box = f"0 0 {width:.0f} {height:.0f}"
    head = f'<svg viewBox="{box}" width="{width:.0f}" role="img" aria-label="{label}">'
    return head + "".join(parts) + "</svg>"
