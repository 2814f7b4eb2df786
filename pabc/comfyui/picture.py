"""Draws what a run did, as an image in the host's form."""

from __future__ import annotations

import torch

from pabc.comfyui.run import Report

CELL, GAP, HEIGHT = 24, 2, 48
"""The pixels of a step: its width, the space after it, and its height."""
COMPUTED, SKIPPED, NEITHER = (0.1, 0.35, 0.7), (0.82, 0.88, 0.93), (0.6, 0.6, 0.6)
"""The colors of a step that calls the model, of one that does not, and of one that did not run."""


def draw(report: Report | None) -> torch.Tensor:
    """Returns an image with a cell for each step, [1, height, width, 3]; dark: calls the model.

    A step of several calls is a column of as many cells.
    """
    num_steps = 1 if report is None else len(report.sigmas)
    image = torch.ones(1, HEIGHT, num_steps * (CELL + GAP) - GAP, 3)
    for step in range(num_steps):
        left = step * (CELL + GAP)
        colors = [NEITHER] if report is None else _colors(report, step)
        for i, color in enumerate(colors):
            top, bottom = (HEIGHT * k // len(colors) for k in (i, i + 1))
            image[:, top : bottom - (i + 1 < len(colors)), left : left + CELL] = torch.tensor(color)
    return image


def _colors(report: Report, step: int) -> list[tuple[float, float, float]]:
    calls, skipped = report.calls[step], report.skipped[step]
    return [COMPUTED] * (calls - skipped) + [SKIPPED] * skipped or [NEITHER]
