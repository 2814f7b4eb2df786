"""Checks of what users pass in. Each raises `ValueError`: `name: expected ..., found ...`."""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import numpy as np

JSON_VERSION = 1


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raises `ValueError` unless `value` is one of `choices`."""
    try:
        is_known = value in choices
    except (ValueError, RuntimeError):  # an array or a tensor
        is_known = False
    if not is_known:
        raise ValueError(f"{name}: expected one of {tuple(choices)}, found {value!r}")


def to_lists(values: Any) -> Any:
    """Returns what an array or a tensor holds as lists; anything else, and what has no data, as it
    is."""
    try:
        return values.tolist() if hasattr(values, "tolist") else values
    except (NotImplementedError, RuntimeError):  # a meta tensor
        return values


def as_timesteps(values: Any) -> tuple[float, ...]:
    """Returns a non-empty flat sequence, array or tensor of finite numbers as floats."""
    items = to_lists(values)
    try:
        if isinstance(items, str | bytes | Mapping):
            raise TypeError
        items = list(items)
        if any(isinstance(item, str | bytes | bool) for item in items):
            raise TypeError
        timesteps = tuple(float(item) for item in items)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ValueError(
            f"timesteps: expected a flat sequence of numbers, found {values!r}"
        ) from None
    if not timesteps:
        raise ValueError("timesteps: expected one per step, at least 1, found none")
    for step, timestep in enumerate(timesteps):
        if not math.isfinite(timestep):
            raise ValueError(
                f"timesteps: expected finite numbers, found {timestep!r} at step {step}"
            )
    return timesteps


def as_range(value: Any, name: str) -> int:
    """Returns an integer of 1 or more."""
    try:
        every = 0 if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        every = 0
    if every < 1:
        raise ValueError(f"{name}: expected an integer of 1 or more, or None, found {value!r}")
    return every


_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9} | {
    unit: 2 ** (10 * power) for power, unit in enumerate(("KiB", "MiB", "GiB"), start=1)
}


def as_bytes(value: Any, name: str) -> int:
    """Returns a number of bytes, 1 or more, from an integer, or text such as `"1.5 GiB"`."""
    found = 0
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", value)
        if match is not None and match[2] in _UNITS:
            found = int(Fraction(match[1]) * _UNITS[match[2]])
    elif isinstance(value, int | np.integer) and not isinstance(value, bool):
        found = int(value)
    if found < 1:
        raise ValueError(
            f"{name}: expected a number of bytes, 1 or more, or text with a unit "
            f"({', '.join(_UNITS)}), such as '2GiB', found {value!r}"
        )
    return found


def as_pair(value: Any, name: str) -> tuple[float, float]:
    """Returns two finite numbers, the first below the second."""
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        low, high = (float(bound) for bound in value)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name}: expected a pair of numbers (low, high), found {value!r}"
        ) from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"{name}: expected finite (low, high) with low < high, found {value!r}")
    return low, high


def as_mask(values: Any, name: str, *, num_steps: int | None = None) -> tuple[bool, ...]:
    """Returns one bool per step, the first False; checks the length where `num_steps` is given."""
    items = to_lists(values)
    if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
        raise ValueError(f"{name}: expected one bool per step, found {values!r}")
    items = tuple(items)
    for step, item in enumerate(items):
        if not isinstance(item, bool | np.bool_):
            raise ValueError(
                f"{name}: expected True (reuse) or False, found {item!r} at step {step}"
            )
    if num_steps is not None and len(items) != num_steps:
        raise ValueError(f"{name}: expected one bool per step ({num_steps}), found {len(items)}")
    if items and items[0]:
        raise ValueError(
            f"{name}: expected False at step 0, as nothing is stored yet, found True (reuse)"
        )
    return tuple(bool(item) for item in items)


def as_layers(values: Any, name: str) -> tuple[int, ...]:
    """Returns one or more integers of 0 or more, sorted, each once."""
    try:
        items = list(values) if isinstance(values, Iterable) else [values]
        if any(isinstance(item, bool | np.bool_) for item in items):
            raise TypeError
        layers = tuple(sorted({operator.index(item) for item in items}))
    except TypeError:
        layers = ()
    if not layers or layers[0] < 0:
        raise ValueError(f"{name}: expected integers of 0 or more, or None, found {values!r}")
    return layers


def parse_document(
    text: str,
    name: str,
    fields: Mapping[str, type],
    optional: Mapping[str, type] = MappingProxyType({}),
) -> dict[str, Any]:
    """Returns the JSON object that pabc wrote: its name, version, and fields of the given types."""
    try:
        content = json.loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} JSON: expected valid JSON, found an error: {error}") from error
    check_fields(content, f"{name} JSON", ("pabc", "version", *fields), tuple(optional))
    for field, allowed in (("pabc", name), ("version", JSON_VERSION)):
        if content[field] != allowed or isinstance(content[field], bool):
            raise ValueError(
                f"{name} JSON, {field}: expected {allowed!r}, found {content[field]!r}"
            )
    for field, expected in {**fields, **optional}.items():
        if field in content and not isinstance(content[field], expected):
            found = type(content[field]).__name__
            raise ValueError(f"{name} JSON, {field}: expected {expected.__name__}, found {found}")
    return content


def check_fields(
    content: object, where: str, fields: Sequence[str], optional: Sequence[str] = ()
) -> None:
    """Raises unless `content` is a JSON object with these fields, and at most the optional ones."""
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected an object, found {type(content).__name__}")
    for field in content:
        if field not in fields and field not in optional:
            also = f" and perhaps {', '.join(optional)}" if optional else ""
            raise ValueError(f"{where}: expected fields {', '.join(fields)}{also}, found {field!r}")
    for field in fields:
        if field not in content:
            raise ValueError(f"{where}: expected fields {', '.join(fields)}, found no {field!r}")
