"""Gains: where kernels are faster than what they replace, as measured by device and shape."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("gains.json")
"""Device name -> kernel -> [shape, time of the best alternative over the kernel's], written by
`bench/kernel_*.py --record`. Devices without an entry have not been measured."""
LEAST = 1.05
"""A kernel is used if it is at least this many times as fast."""


def find_gain(kernel: str, device: torch.device, shape: tuple[int, ...]) -> bool | None:
    """Returns True if a kernel is faster on a device, by the measured shape most like `shape`.

    None if nothing was measured.
    """
    if device.type != "cuda":
        return None
    rows = _read_table().get(torch.cuda.get_device_name(device), {}).get(kernel, [])
    if not rows:
        return None
    _, ratio = min(rows, key=lambda row: _distance(tuple(row[0]), shape))
    return ratio >= LEAST


@cache
def _read_table() -> dict[str, dict[str, list[tuple[list[int], float]]]]:
    table: dict[str, dict[str, list[tuple[list[int], float]]]] = json.loads(TABLE.read_text())
    return table


def _distance(shape: tuple[int, ...], other: tuple[int, ...]) -> float:
    """Returns the largest difference of a dimension, in powers of two."""
    pairs = zip(shape, other, strict=True)
    return max(abs(math.log2(a / b)) for a, b in pairs)
