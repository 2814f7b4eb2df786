"""Where kernels are faster than what they replace: measured, per device and shape."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("gains.json")
"""Device name -> kernel -> [shape, ratio to the best alternative], as `bench/kernel_*.py` writes
it. A device that is not in it has not been measured."""
LEAST = 1.05
"""The ratio from which a kernel is taken."""


def find_gain(kernel: str, device: torch.device, shape: tuple[int, ...]) -> bool | None:
    """Whether a kernel is faster for this shape on this device, by the measured shape most like it;
    None: nothing was measured."""
    if device.type != "cuda":
        return None
    rows = _read_table().get(torch.cuda.get_device_name(device), {}).get(kernel, [])
    if not rows:
        return None
    _, ratio = min(rows, key=lambda row: _distance(tuple(row[0]), shape))
    return ratio >= LEAST


@cache
def _read_table() -> dict[str, dict[str, list[tuple[list[int], float]]]]:
    found: dict[str, dict[str, list[tuple[list[int], float]]]] = json.loads(TABLE.read_text())
    return found


def _distance(shape: tuple[int, ...], other: tuple[int, ...]) -> float:
    """How much larger or smaller the dimensions are, at most of one, in powers of two."""
    pairs = zip(shape, other, strict=True)
    return max(abs(math.log2(a / b)) for a, b in pairs)
