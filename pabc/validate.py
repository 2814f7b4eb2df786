"""Checks of what users pass in. Each raises `ValueError` with field, value and what is allowed."""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

JSON_VERSION = 1


def as_timesteps(values: Any) -> tuple[float, ...]:
    """A non-empty flat sequence, array or tensor of finite numbers, as floats."""
    items = values.tolist() if hasattr(values, "tolist") else values
    try:
        if isinstance(items, str | bytes | Mapping):
            raise TypeError
        items = list(items)
        if any(isinstance(item, str | bytes | bool) for item in items):
            raise TypeError
        timesteps = tuple(float(item) for item in items)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"timesteps: got {values!r}, allowed: a flat sequence of numbers"
        ) from None
    if not timesteps:
        raise ValueError("timesteps: got none, allowed: one per step, at least 1")
    for step, timestep in enumerate(timesteps):
        if not math.isfinite(timestep):
            raise ValueError(f"timesteps: got {timestep!r} at step {step}, allowed: finite numbers")
    return timesteps


def as_range(value: Any, name: str) -> int:
    """An integer of 1 or more."""
    try:
        every = 0 if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        every = 0
    if every < 1:
        raise ValueError(f"{name}: got range {value!r}, allowed: an integer of 1 or more, or None")
    return every


_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9} | {
    unit: 2 ** (10 * power) for power, unit in enumerate(("KiB", "MiB", "GiB"), start=1)
}


def as_bytes(value: Any, name: str) -> int:
    """A number of bytes, 1 or more: an integer, or text with a unit, such as `"1.5 GiB"`."""
    found = 0
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", value)
        if match is not None and match[2] in _UNITS:
            found = int(Fraction(match[1]) * _UNITS[match[2]])
    elif isinstance(value, int | np.integer) and not isinstance(value, bool):
        found = int(value)
    if found < 1:
        raise ValueError(
            f"{name}: got {value!r}, allowed: a number of bytes, 1 or more, or text with a unit "
            f"({', '.join(_UNITS)}), such as '2GiB'"
        )
    return found


def as_pair(value: Any, name: str) -> tuple[float, float]:
    """Two finite numbers, the first below the second."""
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        low, high = (float(bound) for bound in value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: got {value!r}, allowed: a pair of numbers (low, high)") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"{name}: got {value!r}, allowed: finite (low, high) with low < high")
    return low, high


def as_mask(values: Any, name: str, *, num_steps: int | None = None) -> tuple[bool, ...]:
    """One bool per step, the first False; the length is checked where `num_steps` is given."""
    items = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
        raise ValueError(f"{name}: got {values!r}, allowed: one bool per step")
    items = tuple(items)
    for step, item in enumerate(items):
        if not isinstance(item, bool | np.bool_):
            raise ValueError(f"{name}: got {item!r} at step {step}, allowed: True (reuse) or False")
    if num_steps is not None and len(items) != num_steps:
        raise ValueError(f"{name}: got length {len(items)}, allowed: one per step ({num_steps})")
    if items and items[0]:
        raise ValueError(
            f"{name}: got True (reuse) at step 0, allowed: False, as nothing is stored yet"
        )
    return tuple(bool(item) for item in items)


def as_layers(values: Any, name: str) -> tuple[int, ...]:
    """One or more integers of 0 or more, sorted, each once."""
    try:
        items = list(values) if isinstance(values, Iterable) else [values]
        if any(isinstance(item, bool | np.bool_) for item in items):
            raise TypeError
        layers = tuple(sorted({operator.index(item) for item in items}))
    except TypeError:
        layers = ()
    if not layers or layers[0] < 0:
        raise ValueError(f"{name}: got {values!r}, allowed: integers of 0 or more, or None")
    return layers


def parse_document(text: str, name: str, fields: Mapping[str, type]) -> dict[str, Any]:
    """The JSON object that pabc wrote: its name, version, and fields of the given types."""
    try:
        content = json.loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} JSON: not valid JSON ({error})") from error
    check_fields(content, f"{name} JSON", ("pabc", "version", *fields))
    for field, allowed in (("pabc", name), ("version", JSON_VERSION)):
        if content[field] != allowed or isinstance(content[field], bool):
            raise ValueError(f"{name} JSON, {field}: got {content[field]!r}, allowed: {allowed!r}")
    for field, expected in fields.items():
        if not isinstance(content[field], expected):
            got = type(content[field]).__name__
            raise ValueError(f"{name} JSON, {field}: got {got}, allowed: {expected.__name__}")
    return content


def check_fields(content: object, where: str, fields: Sequence[str]) -> None:
    """Raise unless `content` is a JSON object with exactly these fields."""
    if not isinstance(content, dict):
        raise ValueError(f"{where}: got {type(content).__name__}, allowed: an object")
    for field in content:
        if field not in fields:
            raise ValueError(f"{where}: unknown field {field!r}, allowed: {', '.join(fields)}")
    for field in fields:
        if field not in content:
            raise ValueError(f"{where}: field {field!r} is missing, needed: {', '.join(fields)}")
