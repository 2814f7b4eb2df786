"""Schedules: the kinds that a user wants to be reused, at which diffusion steps.

A `Schedule` is a boolean mask per kind over the steps that will really run (True: reuse), with
overrides for single layers. `Schedule.plan` binds it to the slots of a compiled model.
"""

from __future__ import annotations

import fnmatch
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType

import numpy as np

from pabc.base.kinds import KINDS, check_kind
from pabc.plan import Plan, SlotSpec
from pabc.validate import (
    JSON_VERSION,
    as_layers,
    as_mask,
    as_pair,
    as_range,
    as_timesteps,
    check_fields,
    parse_document,
)

__all__ = ["KINDS", "Override", "Schedule"]

Mask = tuple[bool, ...]
Window = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """A mask for some slots, in place of their kind's.

    It applies to slots of `kind` whose `layer` (the ordinal among regions of their kind, in
    execution order) is in `layers` and whose name matches the shell-style pattern `name`. None
    matches any; `kind` or `name` must be given. `mask` is True where the step reuses.
    """

    mask: Mask
    kind: str | None = None
    layers: tuple[int, ...] | None = None
    name: str | None = None

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


@dataclass(frozen=True)
class Schedule:
    """The kinds that are reused at each step. Immutable, hashable, picklable.

    Attributes:
        timesteps: one per step, in the order in which they are run; any order, repeats allowed.
        masks: kind -> one bool per step, True where the step reuses. A mask without True is
            dropped: a kind that is absent is computed at every step.
        overrides: masks for single layers; where several match a slot, the last one holds.
        label: a name for people; equality ignores it.

    Raises `ValueError`, with what was expected and what was found, on anything malformed.
    """

    timesteps: tuple[float, ...]
    masks: Mapping[str, Mask] = field(default_factory=dict)
    overrides: tuple[Override, ...] = ()
    label: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        timesteps = as_timesteps(self.timesteps)
        if not isinstance(self.masks, Mapping):
            raise ValueError(f"masks: expected a mapping from kind to mask, found {self.masks!r}")
        for kind in self.masks:
            check_kind(kind, "masks")
        masks = {
            kind: as_mask(self.masks[kind], f"mask of {kind!r}", num_steps=len(timesteps))
            for kind in KINDS
            if kind in self.masks
        }
        for override in self.overrides:
            if not isinstance(override, Override):
                raise ValueError(f"overrides: expected Override objects, found {override!r}")
            as_mask(override.mask, f"mask of {override}", num_steps=len(timesteps))
        if not isinstance(self.label, str):
            raise ValueError(f"label: expected a string, found {self.label!r}")
        reused = MappingProxyType({kind: mask for kind, mask in masks.items() if any(mask)})
        object.__setattr__(self, "timesteps", timesteps)
        object.__setattr__(self, "masks", reused)
        object.__setattr__(self, "overrides", tuple(self.overrides))

    @classmethod
    def pyramid(
        cls,
        timesteps: Iterable[float],
        *,
        spatial: int | None = None,
        temporal: int | None = None,
        cross: int | None = None,
        full: int | None = None,
        joint: int | None = None,
        mlp: int | None = None,
        other: int | None = None,
        window: Window | Mapping[str, Window] | None = None,
        fraction: Window | None = None,
    ) -> Schedule:
        """Returns the schedule of the Pyramid Attention Broadcast rule (arXiv 2408.12588).

        Step i computes a kind of range n when i is a multiple of n, counted from the first step of
        the generation, or when i lies outside the window; otherwise it reuses the last computed
        value. A kind whose range is None or 1 is computed at every step.

        `timesteps` are those that will be run, one per step (a sequence, array or tensor).

        `window` is (low, high) in timestep units, both strict, or a mapping from kind to such a
        pair (a kind without a pair has no window). As published, a timestep is truncated to an
        integer before it is compared; where a bound is not integral (timesteps between 0 and 1) it
        is compared as it is. `fraction` is (low, high) of the steps instead: step i of n is inside
        when low * n <= i < high * n. With neither, all steps are inside.

        Raises `ValueError` on bad values; warns when a window has no step in it, or nothing is
        reused.
        """
        steps = as_timesteps(timesteps)
        given = {
            "spatial": spatial,
            "temporal": temporal,
            "full": full,
            "joint": joint,
            "cross": cross,
            "mlp": mlp,
            "other": other,
        }
        ranges = {kind: as_range(n, kind) for kind, n in given.items() if n is not None}
        inside = _find_inside_per_kind(steps, ranges, window, fraction)
        masks = {kind: _pyramid_mask(every, inside[kind]) for kind, every in ranges.items()}
        wanted = [kind for kind, every in ranges.items() if every > 1 and any(inside[kind])]
        if wanted and not any(map(any, masks.values())):
            warnings.warn(
                f"nothing is reused: the {len(steps)} steps, or those in the window, are too few "
                f"for the ranges of {', '.join(wanted)}",
                stacklevel=2,
            )
        parts = {**ranges, "window": window, "fraction": fraction}
        words = [f"{name}={value}" for name, value in parts.items() if value is not None]
        return cls(steps, masks, label=" ".join(["pyramid", *words]))

    @classmethod
    def from_masks(
        cls,
        timesteps: Iterable[float],
        masks: Mapping[str, Iterable[bool]],
        *,
        overrides: Iterable[Override] = (),
        label: str = "masks",
    ) -> Schedule:
        """Returns a schedule from masks: kind -> one bool per step, True where it reuses."""
        return cls(as_timesteps(timesteps), masks, tuple(overrides), label)  # type: ignore[arg-type]

    @classmethod
    def none(cls, timesteps: Iterable[float]) -> Schedule:
        """Returns the schedule that reuses nothing."""
        return cls(as_timesteps(timesteps), label="none")

    @property
    def num_steps(self) -> int:
        """Number of diffusion steps."""
        return len(self.timesteps)

    @property
    def reuses(self) -> bool:
        """True if any kind or override reuses."""
        return bool(self.masks) or any(any(override.mask) for override in self.overrides)

    def mask(self, kind: str) -> Mask:
        """Returns the mask of a kind, without overrides; all False if it is always computed."""
        check_kind(kind, "mask")
        return self.masks.get(kind, (False,) * self.num_steps)

    def override(
        self,
        *,
        kind: str | None = None,
        layers: Iterable[int] | int | None = None,
        name: str | None = None,
        every: int | None = None,
        window: Window | None = None,
        fraction: Window | None = None,
        mask: Iterable[bool] | None = None,
    ) -> Schedule:
        """Returns a new schedule with another mask for some slots; see `Override` for which.

        Give either `mask`, or the range `every` (1: always computed) with an optional `window` or
        `fraction`, as in `pyramid`.
        """
        if (mask is None) == (every is None):
            raise ValueError(
                f"override: expected either mask or every, found mask {mask!r} and every {every!r}"
            )
        if mask is not None and (window is not None or fraction is not None):
            raise ValueError(
                "override: expected window or fraction with every, found one with mask"
            )
        if every is not None:
            inside = _find_inside(self.timesteps, window, fraction)
            mask = _pyramid_mask(as_range(every, "every"), inside)
        checked = as_mask(mask, "override mask", num_steps=self.num_steps)
        override = Override(mask=checked, kind=kind, layers=layers, name=name)  # type: ignore[arg-type]
        return Schedule(self.timesteps, self.masks, (*self.overrides, override), self.label)

    def mask_of(self, slot: SlotSpec) -> Mask:
        """Returns the mask of one slot, overrides included."""
        for override in reversed(self.overrides):
            if override.matches(slot):
                return override.mask
        return self.mask(slot.kind)

    def unmatched(self, slots: Sequence[SlotSpec]) -> tuple[str, ...]:
        """Returns the kinds and overrides of this schedule that match none of `slots`."""
        kinds = {slot.kind for slot in slots}
        missing = [f"kind {kind!r}" for kind in self.masks if kind not in kinds]
        missing += [str(o) for o in self.overrides if not any(o.matches(slot) for slot in slots)]
        return tuple(missing)

    def plan(self, slots: Sequence[SlotSpec]) -> Plan:
        """Binds this schedule to a model's slots: actions, sources, lifetimes, phases."""
        columns = [self.mask_of(slot) for slot in slots]
        reuse = np.array(columns, dtype=bool).reshape(len(columns), self.num_steps).T
        return Plan.from_reuse(self.timesteps, slots, reuse)

    def to_json(self) -> str:
        """Returns the schedule as JSON, from which `Schedule.from_json` makes an equal one."""
        overrides = [
            {"kind": o.kind, "layers": o.layers, "name": o.name, "mask": _format_mask(o.mask)}
            for o in self.overrides
        ]
        content = {
            "pabc": "schedule",
            "version": JSON_VERSION,
            "label": self.label,
            "timesteps": self.timesteps,
            "masks": {kind: _format_mask(mask) for kind, mask in self.masks.items()},
            "overrides": overrides,
        }
        return json.dumps(content, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Returns the schedule that `to_json` wrote. Raises `ValueError` on anything else."""
        fields = {"label": str, "timesteps": list, "masks": dict, "overrides": list}
        content = parse_document(text, "schedule", fields)
        masks = {
            kind: _parse_mask(mask, f"masks, {kind}") for kind, mask in content["masks"].items()
        }
        overrides = []
        for index, entry in enumerate(content["overrides"]):
            where = f"overrides[{index}]"
            check_fields(entry, where, ("kind", "layers", "name", "mask"))
            overrides.append(Override(**{**entry, "mask": _parse_mask(entry["mask"], where)}))
        return cls(content["timesteps"], masks, tuple(overrides), content["label"])

    def __hash__(self) -> int:
        return hash((self.timesteps, tuple(self.masks.items()), self.overrides))

    def __reduce__(self) -> tuple[object, ...]:
        return Schedule, (self.timesteps, dict(self.masks), self.overrides, self.label)


def _pyramid_mask(every: int, inside: Sequence[bool]) -> Mask:
    return tuple(is_inside and step % every != 0 for step, is_inside in enumerate(inside))


def _find_inside_per_kind(
    timesteps: tuple[float, ...],
    ranges: Mapping[str, int],
    window: Window | Mapping[str, Window] | None,
    fraction: Window | None,
) -> dict[str, list[bool]]:
    if not isinstance(window, Mapping):
        return dict.fromkeys(ranges, _find_inside(timesteps, window, fraction))
    for kind in window:
        check_kind(kind, "window")
        if kind not in ranges:
            raise ValueError(
                f"window: expected pairs for kinds with a range, found one for {kind!r}"
            )
    if fraction is not None:
        raise ValueError("window, fraction: expected one of them, found both")
    return {kind: _find_inside(timesteps, window.get(kind), None) for kind in ranges}


def _find_inside(
    timesteps: tuple[float, ...], window: Window | None, fraction: Window | None
) -> list[bool]:
    """Returns for each step whether it lies in the window or fraction; all do if both are None."""
    if window is not None and fraction is not None:
        raise ValueError("window, fraction: expected one of them, found both")
    if fraction is not None:
        low, high = as_pair(fraction, "fraction")
        if low < 0 or high > 1:
            raise ValueError(f"fraction: expected 0 <= low < high <= 1, found {fraction!r}")
        # The decimal that was written, not its binary neighbor: 0.7 of 10 steps ends before step 7.
        first, end = (Fraction(repr(bound)) * len(timesteps) for bound in (low, high))
        return [first <= step < end for step in range(len(timesteps))]
    if window is None:
        return [True] * len(timesteps)
    low, high = as_pair(window, "window")
    is_integral = low.is_integer() and high.is_integer()
    inside = [low < (int(t) if is_integral else t) < high for t in timesteps]
    if not any(inside):
        warnings.warn(
            f"window ({low:g}, {high:g}) holds none of the {len(timesteps)} timesteps, which run"
            f" from {timesteps[0]:g} to {timesteps[-1]:g}: nothing is reused there",
            stacklevel=4,
        )
    return inside


def _format_mask(mask: Mask) -> str:
    return "".join("." if reuse else "#" for reuse in mask)


def _parse_mask(text: object, name: str) -> Mask:
    if not isinstance(text, str) or set(text) - set("#."):
        raise ValueError(
            f"{name}: expected a mask of '#' (compute) and '.' (reuse), found {text!r}"
        )
    return tuple(symbol == "." for symbol in text)
