"""Forecasts: how a reuse follows from the values that are stored, the newest first.

A reuse is a weighted sum of stored values. `"hold"` takes the last one as it is; `"linear"` and
`"quadratic"` are the polynomials through the last two or three (of lower order while fewer are
stored); an array gives the weights of each step, such as fitted ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from pabc.base.kinds import KINDS, check_kind
from pabc.validate import to_lists

HOLD = "hold"
NUM_POINTS: Mapping[str, int] = MappingProxyType({"linear": 2, "quadratic": 3})
"""Rule -> the number of stored values that its polynomial goes through."""
NAMES = (HOLD, *NUM_POINTS)
LARGEST = float(np.finfo(np.float32).max)
"""The largest finite weight, since sums are computed in float32."""
UNITS = ("step", "timestep")
"""The variables of polynomials: the index of the step, or its timestep."""

Rows = tuple[tuple[float, ...], ...]
"""One row of weights per step, for the newest value first; the row of a step without reuse may be
empty."""
Forecast = str | Rows
"""One of `NAMES`, or rows of weights."""


def extrapolate(position: float, known: Sequence[float]) -> tuple[float, ...] | None:
    """Returns the weights of values at `known` positions in their polynomial at `position`.

    None if two positions are equal, or so close together that a weight is not finite.
    """
    if len(set(known)) < len(known):
        return None
    weights = [
        math.prod((position - other) / (own - other) for other in known if other != own) + 0.0
        for own in known
    ]
    return tuple(weights) if all(map(math.isfinite, weights)) else None


def as_forecast(value: Any, name: str, *, num_steps: int | None = None) -> Forecast:
    """Returns a forecast: a rule's name, or an array of weights [num_steps, k] as rows.

    The array is a nested sequence, a NumPy array or a tensor. Zeros at the end of a row are
    dropped: the row reads fewer values. Raises `ValueError` on anything else.
    """
    if isinstance(value, str):
        if value not in NAMES:
            raise ValueError(_expected(name, f"{value!r}"))
        return value
    items = to_lists(value)
    if not isinstance(items, Sequence) or isinstance(items, bytes):
        raise ValueError(_expected(name, f"{value!r}"))
    rows = tuple(_as_row(row, step, name) for step, row in enumerate(items))
    if num_steps is not None and len(rows) != num_steps:
        raise ValueError(
            f"{name}: expected one row of weights per step ({num_steps}), found {len(rows)}"
        )
    return rows


def as_forecasts(value: Any, name: str, *, num_steps: int | None = None) -> dict[str, Forecast]:
    """Returns kind -> forecast from a mapping, or from one forecast for all kinds."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(KINDS, as_forecast(value, name, num_steps=num_steps))
    for kind in value:
        check_kind(kind, name)
    return {
        kind: as_forecast(value[kind], f"{name} of {kind!r}", num_steps=num_steps)
        for kind in KINDS
        if kind in value
    }


def choose_forecasts(value: Any, kinds: Iterable[str], num_steps: int) -> dict[str, Forecast]:
    """Returns kind -> forecast for these kinds; raises `ValueError` if a mapping names others."""
    kinds, forecasts = list(kinds), as_forecasts(value, "forecast", num_steps=num_steps)
    if isinstance(value, Mapping):
        for kind in forecasts:
            if kind not in kinds:
                raise ValueError(
                    f"forecast: expected forecasts of kinds that are reused here,"
                    f" {', '.join(kinds) or 'none'}, found one of {kind!r}"
                )
    return {kind: forecast for kind, forecast in forecasts.items() if kind in kinds}


def format_forecast(value: Any) -> str:
    """Returns a forecast, or a mapping from kind to forecast, in a few words."""
    if isinstance(value, Mapping):
        words = (f"{kind}:{format_forecast(forecast)}" for kind, forecast in value.items())
        return ",".join(words)
    return value if isinstance(value, str) else "weights"


def keep_rows(forecast: Forecast, mask: Iterable[bool]) -> Forecast:
    """Returns a forecast without the rows of steps that do not reuse.

    It is `"hold"` if nothing is left but rows that take the last value as it is.
    """
    if isinstance(forecast, str):
        return forecast
    rows = tuple(zip(forecast, mask, strict=True))
    if all(row == (1.0,) for row, reuses in rows if reuses):
        return HOLD
    return tuple(row if reuses else () for row, reuses in rows)


def _as_row(row: Any, step: int, name: str) -> tuple[float, ...]:
    items = to_lists(row)
    where = f"{name}: expected"
    if not isinstance(items, Iterable) or isinstance(items, str | bytes | Mapping):
        raise ValueError(f"{where} a row of weights per step, found {row!r} at step {step}")
    weights = tuple(_as_weight(item, step, name) for item in items)
    while len(weights) > 1 and weights[-1] == 0:
        weights = weights[:-1]
    return weights


def _as_weight(item: Any, step: int, name: str) -> float:
    try:
        if isinstance(item, str | bytes | bool | np.bool_):
            raise TypeError
        weight = float(item)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ValueError(f"{name}: expected weights, found {item!r} at step {step}") from None
    if not abs(weight) <= LARGEST:
        raise ValueError(f"{name}: expected finite weights, found {weight!r} at step {step}")
    return weight + 0.0  # -0.0 is 0.0


def _expected(name: str, found: str) -> str:
    return f"{name}: expected one of {', '.join(NAMES)}, or weights [num_steps, k], found {found}"
