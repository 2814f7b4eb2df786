"""Targets of a plan: a speedup, a fidelity, or a number of calls."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

Measure = Literal["speedup", "psnr", "calls"]


@dataclass(frozen=True)
class Target:
    """One of: a speedup of 1 or more, a PSNR in dB, a number of computed calls a generation."""

    measure: Measure
    value: float

    def __str__(self) -> str:
        return f"{self.measure}={self.value:g}"

    @classmethod
    def of(cls, **given: Any) -> Target:
        """Returns the one target in `given`, by measure. Raises ValueError unless there is one."""
        targets = cls.all_of(**given)
        if len(targets) != 1:
            raise ValueError(f"expected one of speedup, psnr and calls, found {_spell(given)}")
        return targets[0]

    @classmethod
    def all_of(cls, **given: Any) -> tuple[Target, ...]:
        """Returns the targets in `given`: measure -> number, several numbers, or None."""
        targets = []
        for measure, values in given.items():
            for value in _as_numbers(values):
                if not _is_valid(measure, value):
                    raise ValueError(f"{measure}: expected {_WANTED[measure]}, found {value!r}")
                targets.append(cls(measure, float(value)))  # type: ignore[arg-type]
        if not targets:
            raise ValueError(f"expected one of speedup, psnr and calls, found {_spell(given)}")
        return tuple(targets)


_WANTED = {
    "speedup": "a number of 1 or more",
    "psnr": "a number of dB above 0",
    "calls": "an integer of 1 or more",
}


def _as_numbers(values: Any) -> list[Any]:
    if values is None:
        return []
    if isinstance(values, Iterable) and not isinstance(values, str | bytes):
        return list(values)
    return [values]


def _is_valid(measure: str, value: Any) -> bool:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return False
    if isinstance(value, bool | str) or not math.isfinite(number):
        return False
    if measure == "psnr":
        return number > 0
    return number >= 1 and (measure == "speedup" or number == int(number))


def _spell(given: dict[str, Any]) -> str:
    named = [name for name, value in given.items() if value is not None]
    return " and ".join(named) or "none"


def as_seeds(seeds: Iterable[int]) -> tuple[int, ...]:
    """Returns the distinct seeds, in order. Raises ValueError for what are none."""
    wanted = "seeds: expected one integer or more, from -2**63 up to 2**63"
    if not isinstance(seeds, Iterable) or isinstance(seeds, str | bytes):
        raise ValueError(f"{wanted}, found {seeds!r}; a single one is (0,)")
    found = tuple(dict.fromkeys(seeds))
    for seed in found:
        is_number = isinstance(seed, Integral) and not isinstance(seed, bool)
        if not is_number or not -(2**63) <= seed < 2**63:
            raise ValueError(f"{wanted}, found {seed!r}")
    if not found:
        raise ValueError(f"{wanted}, found none")
    return tuple(int(seed) for seed in found)


def as_floor(floor: float) -> float:
    """Returns a PSNR in dB below which no plan is taken. Raises ValueError for what is none."""
    is_number = isinstance(floor, Real) and not isinstance(floor, bool)
    if not is_number or math.isnan(floor):
        raise ValueError(f"floor: expected a number of dB, found {floor!r}")
    return float(floor)


def as_count(candidates: int) -> int:
    """Returns a number of plans that are run. Raises ValueError for what is none."""
    is_number = isinstance(candidates, Integral) and not isinstance(candidates, bool)
    if not is_number or candidates < 1:
        raise ValueError(f"candidates: expected 1 or more, found {candidates!r}")
    return int(candidates)
