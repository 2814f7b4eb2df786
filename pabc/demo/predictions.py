"""Draws the report's part on calibration: frontier, plans, predictions and what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pabc.calibration.calibration import Calibration
from pabc.calibration.plot import draw as draw_frontier
from pabc.demo import charts
from pabc.demo.calibrated import say_misses
from pabc.demo.table import draw_table

FLOOR = 40.0
"""The PSNR in dB below which `pabc.calibrate` and `pabc.auto` take no plan, unless asked to."""


def draw(content: Mapping[str, Any], calibration: Calibration) -> str:
    """Returns the part of the page.

    Args:
        content: the entry of the calibration in `metrics.json`.
        calibration: what was found.
    """
    plans = [candidate for _, candidate in calibration.plans]
    frontier = draw_frontier(calibration.frontier(), plans, FLOOR)
    frontier = frontier.replace(' xmlns="http://www.w3.org/2000/svg"', "")  # HTML needs none
    return "\n".join(
        [
            "<h2>Calibration: the best plan for each speed</h2>",
            f"<p>{escape(_describe_recording(content))} Dots: plans that were run with that noise."
            " Dotted: predictions. Below: the steps that the plans compute which are taken.</p>",
            f'<div class="wide">{frontier}</div>',
            "<details><summary>Every number of computed steps</summary>"
            f"{draw_table(*_list_frontier(content))}</details>",
            "<h2>Predicted against measured</h2>",
            f"<p>{escape(_describe_predictions(content))}</p>",
            f'<div class="wide">{_draw_chart(content)}</div>',
            f'<div class="wide">{draw_table(*_list_plans(content))}</div>',
        ]
    )


def _describe_recording(content: Mapping[str, Any]) -> str:
    captions = ", ".join(f'"{caption}"' for caption in content["captions"])
    return (
        f"Recorded: one generation of other prompts ({captions}) and other noise than those that"
        f" are judged. With the {len(content['runs'])} runs of plans, calibration took"
        f" {content['seconds']:.0f} s. Speedups are of uncompiled calls of"
        f" {1e3 * content['seconds_full']:.1f} ms, and forecasts of"
        f" {1e3 * content['seconds_skipped']:.2f} ms."
    )


def _describe_predictions(content: Mapping[str, Any]) -> str:
    return (
        f"{say_misses(content)} PSNR is that to the full result; a prediction is corrected by the"
        " other plans of its kind. Dots: plans with the recorded noise. Rings: those that are"
        " taken, on the samples that are judged. A plan is verified, not trusted."
    )


def _draw_chart(content: Mapping[str, Any]) -> str:
    runs = {
        f"{run['computed']} computed steps, {run['plan']}": (run["predicted"], run["measured"])
        for run in content["runs"]
        if None not in (run["predicted"], run["measured"])
    }
    judged = {
        name: (row["predicted"], plan["judged"])
        for name, plan in content["plans"].items()
        if (row := _find_run(content, plan)) and None not in (row["predicted"], plan["judged"])
    }
    return charts.draw_predictions(runs, judged)


def _find_run(content: Mapping[str, Any], plan: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns the figures of a plan with the recorded noise."""
    key = len(plan["computed"]), plan["plan"]
    return next((r for r in content["runs"] if (r["computed"], r["plan"]) == key), None)


Table = tuple[Sequence[Sequence[str]], Sequence[str]]
"""Rows and header."""


def _list_plans(content: Mapping[str, Any]) -> Table:
    header = ("variant", "plan", "computed", "predicted", "measured when calibrated", "judged")
    rows = []
    for name, plan in content["plans"].items():
        run = _find_run(content, plan) or {"predicted": None, "measured": None}
        row = [name, plan["plan"], f"{len(plan['computed'])}", _format(run["predicted"])]
        row += [_format(run["measured"]), _format(plan["judged"]), _format(plan["judged_worst"])]
        rows.append(row)
    return rows, (*header, "judged, worst")


def _list_frontier(content: Mapping[str, Any]) -> Table:
    header = ("computed steps", "speedup", "predicted", "measured", "plan")
    rows = [
        [
            f"{row['computed']}",
            f"{row['speedup']:.2f}x",
            _format(row["predicted"]),
            _format(row["measured"]),
            row["plan"],
        ]
        for row in content["frontier"]
    ]
    return rows, header


def _format(decibels: float | None) -> str:
    return "-" if decibels is None else f"{decibels:.1f} dB"
