"""Describes what a run did, as text."""

from __future__ import annotations

from pabc.base.format import format_table
from pabc.comfyui.run import Report

NOTHING = "no sampler has run with this model yet"
FULL = "this run was computed in full"


def describe(report: Report | None) -> str:
    """Returns a table of the steps of a run, and what its plan is."""
    if report is None:
        return NOTHING
    steps = range(len(report.sigmas))
    calls, skipped = sum(report.calls.values()), sum(report.skipped.values())
    rows = [
        (str(i), f"{report.sigmas[i]:.4g}", str(report.calls[i]), str(report.skipped[i]))
        for i in steps
    ]
    rate = f", {calls / (calls - skipped):.2f} times fewer" if calls > skipped else ""
    schedule = report.schedule
    followed = f"schedule: {schedule.label}" if schedule is not None and schedule.reuses else FULL
    lines = [
        *([f"plan: {report.source}"] if report.source else []),
        followed,
        *([] if report.left is None else [f"the rest of the run was computed: {report.left}"]),
        f"{calls} calls of the model in {len(steps)} steps, {skipped} of them skipped{rate}",
        *format_table(("step", "sigma", "calls", "skipped"), rows),
    ]
    return "\n".join(lines)
