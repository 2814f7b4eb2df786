"""Draws the frontier of `pareto.py` as SVG: PSNR over speed, a line per method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from pareto_table import Row, group

WIDTH, HEIGHT = 460, 330
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 34, 42
COLORS = ("#d55e00", "#0072b2", "#009e73", "#b0679a", "#e69f00", "#56b4e9", "#8c6d31", "#4b4b4b")
"""A palette that is safe for color-blind readers."""
OWN_COLOR = COLORS[0]
MOST_SPEED = 4.2
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.faint{fill:#777;font-size:11px}"
    ".grid{stroke:#ddd;stroke-width:1}.line{fill:none;stroke-width:1.5}.own{stroke-width:3}"
    ".aid{stroke:#777;stroke-dasharray:5 4}"
)


def draw_all(out: Path, rows: Mapping[str, Row]) -> list[Path]:
    """Writes a picture per setup that has more than fewer steps, beside the JSON; returns them."""
    found = []
    for name, own in group(rows).items():
        if sum("psnr" in row for row in own) < 3:
            continue
        words = "".join(c if c.isalnum() else "_" for c in name).lower()
        while "__" in words:
            words = words.replace("__", "_")
        path = out.with_name(f"{out.stem.split('_')[0]}_{words}.svg")
        path.write_text(draw(name, own) + "\n")
        found.append(path)
    return found


def draw(title: str, rows: Sequence[Row]) -> str:
    """Returns two panels, to the full run and to the fine solution, with a legend."""
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] != "full"))
    methods.sort(key=lambda method: not method.startswith("pabc calibrated"))
    lines = {m: [row for row in rows if row["method"] == m and "psnr" in row] for m in methods}
    lines = {method: found for method, found in lines.items() if found}
    full = next((row for row in rows if row["method"] == "full"), None)
    parts = [f"<style>{STYLE}</style>", _text(LEFT, 16, title, "start")]
    panels = [("psnr", "PSNR to the full run, dB"), ("fine_psnr", "to the fine solution, dB")]
    for index, (key, label) in enumerate(panels):
        level = full[key] if full is not None and key == "fine_psnr" else None
        parts.append(f'<g transform="translate({index * WIDTH} 10)">')
        parts += [*_draw_panel(lines, key, label, level), "</g>"]
    parts += _draw_legend(lines, 2 * WIDTH + 12)
    width, height = 2 * WIDTH + 220, max(HEIGHT + 20, 40 + 17 * len(lines))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
        f' role="img" aria-label="{escape(title)}">'
    )
    return head + "".join(parts) + "</svg>"


def _draw_panel(
    lines: Mapping[str, Sequence[Row]], key: str, label: str, level: float | None
) -> list[str]:
    values = [row[key] for found in lines.values() for row in found if math.isfinite(row[key])]
    values += [level] if level is not None else []
    low, high = 5 * math.floor(min(values) / 5), 5 * math.ceil(max(values) / 5)
    high = max(high, low + 5)

    def x_of(speed: float) -> float:
        part = math.log(min(speed, MOST_SPEED)) / math.log(MOST_SPEED)
        return LEFT + part * (WIDTH - LEFT - RIGHT)

    def y_of(value: float) -> float:
        part = (max(value, low) - low) / (high - low)
        return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)

    parts = [_text((LEFT + WIDTH) / 2, HEIGHT - 6, f"times less work; {label}", "middle", "faint")]
    for value in range(low, high + 1, 5 if high - low <= 50 else 10):
        y = y_of(value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" class="grid"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{value}", "end", "faint"))
    for speed in (1, 1.5, 2, 2.5, 3, 4):
        parts.append(_text(x_of(speed), HEIGHT - BOTTOM + 16, f"{speed:g}x", "middle", "faint"))
    if level is not None:
        y = y_of(level)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" class="aid"/>')
    for index, (method, found) in enumerate(lines.items()):
        ordered = sorted(found, key=lambda row: -row["share"])
        points = [(x_of(1 / row["share"]), y_of(row[key]), row) for row in ordered]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in points)
        name = "line own" if method.startswith("pabc calibrated") else "line"
        color, dash = _find_style(index)
        parts.append(f'<path d="M{path}" class="{name}" stroke="{color}"{dash}/>')
        for x, y, row in points:
            about = f"{method}: {1 / row['share']:.2f}x, {row[key]:.1f} dB {row.get('setting')}"
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}">'
                f"<title>{escape(about)}</title></circle>"
            )
    return parts


def _find_style(index: int) -> tuple[str, str]:
    """Returns color and dashes of the line of this index."""
    dashes = ("", ' stroke-dasharray="6 3"', ' stroke-dasharray="2 3"')
    return COLORS[index % len(COLORS)], dashes[index // len(COLORS) % len(dashes)]


def _draw_legend(lines: Mapping[str, object], x: float) -> list[str]:
    parts = []
    for index, method in enumerate(lines):
        color, dash = _find_style(index)
        y = 40 + 17 * index
        parts.append(f'<path d="M{x} {y}h22" stroke="{color}" stroke-width="2"{dash}/>')
        parts.append(_text(x + 28, y + 4, method, "start"))
    return parts


def _text(x: float, y: float, text: str, anchor: str, name: str = "label") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{name}">{escape(text)}</text>'
    )
