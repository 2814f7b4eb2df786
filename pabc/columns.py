"""Columns: what the steps do with one slot, as text, a symbol per step, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from pabc.base.format import format_numbers
from pabc.forecasts import HOLD, Forecast, as_forecast
from pabc.lifetimes import HELD, Reading, Readings

SYMBOLS = "#+.-"
"""By `Action`: compute, compute and store, reuse, covered."""
FORECAST = "~"
"""A reuse that is more than the last value as it is."""
READS = f".{FORECAST}"
FIELDS = ("forecast", "sources", "weights")
"""Fields of a slot in JSON, if it has a forecast; `sources` and `weights` hold one list per step
that reuses the slot."""

_WORDS = {"#": "compute", "+": "compute and store", ".": "reuse"}
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_RARE_WORDS = {FORECAST: "forecast", "-": "covered"}


def format_column(actions: Iterable[int], readings: Readings) -> str:
    """Returns one symbol per step."""
    forecasts = {step for step, reading in readings.items() if reading.weights != HELD}
    return "".join(
        FORECAST if step in forecasts else SYMBOLS[action] for step, action in enumerate(actions)
    )


def format_legend(columns: Iterable[str]) -> str:
    """Returns what the symbols mean; forecasts and covered slots only where they occur."""
    occurring = set().union(*columns)
    words = _WORDS | {symbol: word for symbol, word in _RARE_WORDS.items() if symbol in occurring}
    return ", ".join(f"{symbol} {word}" for symbol, word in words.items())


def group_columns(
    places: Sequence[tuple[str, int]], columns: Sequence[str]
) -> list[tuple[str, str]]:
    """Returns label and column for each group of slots that are of one kind and act alike.

    `places` are the slots' kinds and layers.
    """
    groups: dict[tuple[str, str], set[int]] = {}
    for (kind, layer), column in zip(places, columns, strict=True):
        groups.setdefault((kind, column), set()).add(layer)
    kinds = [kind for kind, _ in groups]
    return [
        (kind if kinds.count(kind) == 1 else f"{kind} {format_numbers(layers)}", column)
        for (kind, column), layers in groups.items()
    ]


def format_phases(phase_of_step: Iterable[int]) -> str:
    """Returns one digit or letter per step; `*` for phases beyond `z`."""
    return "".join(_DIGITS[phase] if phase < len(_DIGITS) else "*" for phase in phase_of_step)


def parse_column(column: object, where: str, num_steps: int) -> str:
    """Returns a column of that many steps. Raises `ValueError` on anything else."""
    if not isinstance(column, str) or set(column) - set(SYMBOLS + FORECAST):
        *symbols, last = map(repr, SYMBOLS + FORECAST)
        raise ValueError(
            f"{where}.actions: expected a string of {', '.join(symbols)} and {last}, found"
            f" {column!r}"
        )
    if len(column) != num_steps:
        raise ValueError(
            f"{where}.actions: expected one per step ({num_steps}), found {len(column)}"
        )
    return column


def check_column(found: str, expected: str, where: str) -> None:
    """Raises `ValueError` unless a column is the one that follows from a plan."""
    if found != expected:
        rare = "".join(
            f", {symbol!r} exactly where it is {word}"
            for symbol, word in ((FORECAST, "reused by a forecast"), ("-", "covered"))
            if symbol in found + expected
        )
        raise ValueError(
            f"{where}.actions: expected '+' exactly where a later step reads the value{rare},"
            f" {expected!r}, found {found!r}"
        )


def write_readings(forecast: Forecast, readings: Readings) -> dict[str, Any]:
    """Returns the JSON fields of a slot's forecast; none if it holds."""
    if forecast == HOLD:
        return {}
    return {
        "forecast": forecast if isinstance(forecast, str) else "weights",
        "sources": [list(reading.sources) for reading in readings.values()],
        "weights": [list(reading.weights) for reading in readings.values()],
    }


def parse_readings(fields: dict[str, Any], column: str, name: str) -> tuple[Forecast, Readings]:
    """Returns the forecast of a slot, and what each step reads, from what `write_readings` wrote.

    Raises `ValueError`, which says slot and step, if a source is no earlier step that computes.
    """
    if not fields:
        return HOLD, {}
    steps = [step for step, symbol in enumerate(column) if symbol in READS]
    for field in FIELDS:
        if field not in fields:
            raise ValueError(
                f"slot {name!r}: expected {', '.join(FIELDS)} together, found no {field!r}"
            )
        lists = fields[field] if field != "forecast" else [[]] * len(steps)
        if not _is_list_of_lists(lists) or len(lists) != len(steps):
            raise ValueError(
                f"slot {name!r}: expected {field} to be a list per step that reuses it"
                f" ({len(steps)}), found {lists!r}"
            )
    rows = dict(zip(steps, map(tuple, fields["weights"]), strict=True))
    readings = {}
    for step, sources in zip(steps, fields["sources"], strict=True):
        _check_sources(sources, step, column, f"slot {name!r}, step {step}")
        if len(rows[step]) != len(sources):
            raise ValueError(
                f"slot {name!r}, step {step}: expected a weight per source ({len(sources)}), found"
                f" {len(rows[step])}"
            )
        readings[step] = Reading(tuple(sources), rows[step])
    given = fields["forecast"]
    if given == "weights":
        given = [rows.get(step, ()) for step in range(len(column))]
    return as_forecast(given, f"slot {name!r}, forecast"), readings


def check_readings(found: Readings, expected: Readings, name: str) -> None:
    """Raises `ValueError` unless the readings that were found are those that follow from a plan."""
    for step, reading in found.items():
        sources, weights = expected[step]
        if reading.sources != sources:
            raise ValueError(
                f"slot {name!r}, step {step}: expected sources {list(sources)}, found"
                f" {list(reading.sources)}"
            )
        if not all(map(_is_close, reading.weights, weights)):
            raise ValueError(
                f"slot {name!r}, step {step}: expected weights {list(weights)}, found"
                f" {list(reading.weights)}"
            )


def _is_list_of_lists(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, list) for item in value)


def _is_close(found: object, expected: float) -> bool:
    return (
        isinstance(found, int | float)
        and not isinstance(found, bool)
        and math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-12)
    )


def _check_sources(sources: Sequence[object], step: int, column: str, where: str) -> None:
    computed = [s for s in range(step - 1, -1, -1) if column[s] in "#+"]
    for source in sources:
        if isinstance(source, bool) or not isinstance(source, int) or not 0 <= source < step:
            raise ValueError(f"{where}: expected sources to be earlier steps, found {source!r}")
        if source not in computed:
            fault = "is covered" if column[source] == "-" else "reuses the slot itself"
            raise ValueError(
                f"{where}: expected sources that compute the slot, found step {source}, which"
                f" {fault}"
            )
    if not 1 <= len(sources) <= len(computed):
        raise ValueError(
            f"{where}: expected at most {len(computed)} sources, as many values are stored by then,"
            f" and at least 1, found {len(sources)}"
        )
    if list(sources) != computed[: len(sources)]:
        raise ValueError(
            f"{where}: expected the last computed steps as sources, {computed[: len(sources)]},"
            f" found {list(sources)}"
        )
