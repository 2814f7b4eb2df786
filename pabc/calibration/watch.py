"""Watches the calls of a model during a generation: their seconds, and how a generation opens."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pabc.calibration.digests import describe_precision

OPENING = (0, 1, 2)
"""The steps whose inputs tell whether two full generations are the same: the first follows from the
prompts and the noise, the others from the sampler (multistep ones differ at the third) and the
guidance scale."""
COMPUTED = 1
"""The last of these whose inputs are the same whatever the plan: each computes the first step."""
SAMPLED = 1024
"""The elements of a tensor that are kept for that, evenly spaced, at most."""


@dataclass
class Watch:
    """Sees each call of one generation.

    Attributes:
        full, skipped: the seconds of calls that were computed, and of those that were forecast.
        opening: step -> numbers out of each floating-point input of its first call.
        num_skipped: step -> the calls that were forecast.
        precision: of the first call: the dtypes of its arguments, and autocast.
    """

    full: list[float] = field(default_factory=list)
    skipped: list[float] = field(default_factory=list)
    opening: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    num_skipped: Counter[int] = field(default_factory=Counter)
    precision: str = ""
    _began: float = 0.0

    def start(self) -> None:
        """Notes that a call begins."""
        self._began = _now()

    def stop(self) -> float:
        """Returns the seconds of the call that began last."""
        return _now() - self._began

    def note(self, step: int, seconds: float, leaves: Sequence[Any], *, was_reused: bool) -> None:
        """Keeps what is of use of a call with these arguments."""
        (self.skipped if was_reused else self.full).append(seconds)
        self.num_skipped[step] += was_reused
        if step in OPENING and step not in self.opening:
            self.opening[step] = _sample(leaves)
            self.precision = self.precision or describe_precision(leaves)


def _now() -> float:
    """Returns the time at which all that was asked of an accelerator so far is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _sample(leaves: Sequence[Any]) -> list[torch.Tensor]:
    """Returns numbers out of each floating-point tensor among the arguments."""
    flat = [
        leaf.detach().reshape(-1)
        for leaf in leaves
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.numel()
    ]
    parts = [each[:: -(-len(each) // SAMPLED)] for each in flat]
    return [part.to(device="cpu", dtype=torch.float32, copy=True) for part in parts]


def differ(before: Sequence[torch.Tensor], now: Sequence[torch.Tensor]) -> bool:
    """Returns whether any input is another than before, by more than a device's rounding."""
    if [len(part) for part in before] != [len(part) for part in now]:
        return True
    return any(_is_other(a, b) for a, b in zip(before, now, strict=True))


def _is_other(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).norm()) > _TOLERANCE * float(a.norm())


_TOLERANCE = 0.01
"""Relative to the norm; new noise makes a difference of 1.4."""
