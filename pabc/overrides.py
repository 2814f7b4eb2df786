"""Overrides: masks and forecasts for single layers, in place of those of their kind."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pabc.base.kinds import check_kind
from pabc.forecasts import Forecast, as_forecast, keep_rows
from pabc.slots import SlotSpec
from pabc.steps import Mask
from pabc.validate import as_layers, as_mask, check_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """A mask for some slots, in place of their kind's.

    It applies to slots of `kind` whose `layer` (the ordinal among regions of their kind, in
    execution order) is in `layers` and whose name matches the shell-style pattern `name`. None
    matches any; `kind` or `name` must be given. `mask` is True where the step reuses. `forecast` is
    how a reuse follows from stored values, as in `Schedule.forecasts`, or `"hold"`; None: as the
    schedule says for the slot's kind.
    """

    mask: Mask
    kind: str | None = None
    layers: tuple[int, ...] | None = None
    name: str | None = None
    forecast: Forecast | None = None

    def __post_init__(self) -> None:
        if self.kind is None and self.name is None:
            raise ValueError("override: expected a kind, a name or both, found neither")
        if self.kind is not None:
            check_kind(self.kind, "override")
        if self.name is not None and not isinstance(self.name, str):
            raise ValueError(f"override name: expected a pattern or None, found {self.name!r}")
        if self.layers is not None:
            object.__setattr__(self, "layers", as_layers(self.layers, "override layers"))
        object.__setattr__(self, "mask", as_mask(self.mask, "override mask"))
        if self.forecast is not None:
            num_steps = len(self.mask)
            forecast = as_forecast(self.forecast, "override forecast", num_steps=num_steps)
            kept = keep_rows(forecast, self.mask) if any(self.mask) else None
            object.__setattr__(self, "forecast", kept)

    def matches(self, slot: SlotSpec) -> bool:
        """Returns whether this override applies to `slot`."""
        return (
            self.kind in (None, slot.kind)
            and (self.layers is None or slot.layer in self.layers)
            and (self.name is None or fnmatch.fnmatchcase(slot.name, self.name))
        )

    def __str__(self) -> str:
        parts = {"kind": self.kind, "layers": self.layers, "name": self.name}
        given = [f"{key} {value!r}" for key, value in parts.items() if value is not None]
        return f"override of {', '.join(given)}"

    def to_content(self) -> dict[str, Any]:
        """Returns the override as JSON writes it."""
        content: dict[str, Any] = {"kind": self.kind, "layers": self.layers}
        content |= {"name": self.name, "mask": format_mask(self.mask)}
        return content if self.forecast is None else {**content, "forecast": self.forecast}

    @classmethod
    def from_content(cls, content: Any, where: str) -> Override:
        """Returns the override that JSON says. Raises `ValueError` on anything else."""
        check_fields(content, where, ("kind", "layers", "name", "mask"), ("forecast",))
        return cls(**{**content, "mask": parse_mask(content["mask"], where)})


def format_mask(mask: Mask) -> str:
    """Returns a mask as text: `#` compute, `.` reuse."""
    return "".join("." if reuse else "#" for reuse in mask)


def parse_mask(text: object, name: str) -> Mask:
    """Returns the mask that `format_mask` wrote. Raises `ValueError` on anything else."""
    if not isinstance(text, str) or set(text) - set("#."):
        raise ValueError(
            f"{name}: expected a mask of '#' (compute) and '.' (reuse), found {text!r}"
        )
    return tuple(symbol == "." for symbol in text)


def as_overrides(values: Any) -> tuple[Override, ...]:
    """Returns overrides from an iterable of them."""
    items = tuple(values) if isinstance(values, Iterable) else (values,)
    for item in items:
        if not isinstance(item, Override) or not isinstance(values, Iterable):
            raise ValueError(f"overrides: expected Override objects, found {item!r}")
    return items
