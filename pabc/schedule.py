"""What the user asks for: which kinds are reused at which diffusion steps.

A `Schedule` is a boolean mask per kind over the steps that will really run (True: reuse), with
overrides for single layers. `Schedule.plan` binds it to the slots of a compiled model.
"""

from __future__ import annotations

import fnmatch
import json
import math
import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import numpy as np

from pabc.plan import JSON_VERSION, KINDS, Plan, SlotSpec, check_fields, load_document

__all__ = ["KINDS", "Override", "Schedule"]

Mask = tuple[bool, ...]
Window = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """A mask for some slots, in place of their kind's.

    It applies to slots of `kind` (None: any) whose layer, the ordinal among regions of their kind in
    execution order, is in `layers` (None: any), and whose name matches the shell-style pattern `name`
    (None: any). `kind` or `name` must be given. `mask` is True where the step reuses.
    """

    mask: Mask
    kind: str | None = None
    layers: tuple[int, ...] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.kind is None and self.name is None:
            raise ValueError("override: got neither kind nor name, allowed: one of them, or both")
        if self.kind is not None:
            _check_kind(self.kind, "override kind")
        if self.name is not None and not isinstance(self.name, str):
            raise ValueError(f"override name: got {self.name!r}, allowed: a pattern, or None")
        if self.layers is not None:
            object.__setattr__(self, "layers", _as_layers(self.layers))
        object.__setattr__(self, "mask", _as_mask(self.mask, None, "override mask"))

    def matches(self, slot: SlotSpec) -> bool:
        """Whether this override decides for `slot`."""
        return (
            self.kind in (None, slot.kind)
            and (self.layers is None or slot.layer in self.layers)
            and (self.name is None or fnmatch.fnmatchcase(slot.name, self.name))
        )

    def __str__(self) -> str:
        parts = (("kind", self.kind), ("layers", self.layers), ("name", self.name))
        return "override " + ", ".join(
            f"{key}={value!r}" for key, value in parts if value is not None
        )


@dataclass(frozen=True)
class Schedule:
    """Which kinds are reused at which steps. Immutable, hashable, picklable.

    Attributes:
        timesteps: one per step, in the order in which they are run; any order, repeats allowed.
        masks: kind -> one bool per step, True where the step reuses. A kind that is absent, or whose
            mask has no True (it is dropped), is computed at every step.
        overrides: masks for single layers; where several match a slot, the last one holds.
        label: a name for people; equality ignores it.

    Raises `ValueError`, naming field, value and what is allowed, on anything malformed.
    """

    timesteps: tuple[float, ...]
    masks: Mapping[str, Mask] = field(default_factory=dict)
    overrides: tuple[Override, ...] = ()
    label: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        timesteps = _as_timesteps(self.timesteps)
        if not isinstance(self.masks, Mapping):
            raise ValueError(f"masks: got {self.masks!r}, allowed: a mapping from kind to mask")
        for kind in self.masks:
            _check_kind(kind, "masks")
        masks = {
            kind: _as_mask(self.masks[kind], len(timesteps), f"mask of {kind!r}")
            for kind in KINDS
            if kind in self.masks
        }
        for override in self.overrides:
            if not isinstance(override, Override):
                raise ValueError(f"overrides: got {override!r}, allowed: pabc.schedule.Override")
            _as_mask(override.mask, len(timesteps), f"mask of {override}")
        if not isinstance(self.label, str):
            raise ValueError(f"label: got {self.label!r}, allowed: a string")
        object.__setattr__(self, "timesteps", timesteps)
        masks = {kind: mask for kind, mask in masks.items() if any(mask)}
        object.__setattr__(self, "masks", MappingProxyType(masks))
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
        """The Pyramid Attention Broadcast rule (arXiv 2408.12588).

        Step i computes a kind of range n when i is a multiple of n, counted from the first step of the
        generation, or when i lies outside the window; otherwise it reuses the last computed value.
        A range of None or 1: computed at every step.

        Args:
            timesteps: as they will be run, one per step (a sequence, array or tensor).
            spatial, temporal, cross, full, joint, mlp, other: the range of each kind.
            window: (low, high) in timestep units, both strict, or a mapping from kind to such a pair (a
                kind with a range and no pair has no window). As published, a timestep is truncated to
                an integer before it is compared; where a bound is not integral (timesteps from 0 to
                1), it is compared as it is.
            fraction: (low, high) of the steps instead: step i of n is inside when low*n <= i < high*n.
                With neither, all steps are inside.

        Raises `ValueError` on bad values; warns when a window has no step in it.
        """
        steps = _as_timesteps(timesteps)
        given = dict(
            spatial=spatial,
            temporal=temporal,
            full=full,
            joint=joint,
            cross=cross,
            mlp=mlp,
            other=other,
        )
        ranges = {
            kind: _as_range(every, kind) for kind, every in given.items() if every is not None
        }
        if window is not None and fraction is not None:
            raise ValueError(
                f"window, fraction: got {window!r} and {fraction!r}, allowed: one of them"
            )
        if isinstance(window, Mapping):
            for kind in window:
                _check_kind(kind, "window")
                if kind not in ranges:
                    raise ValueError(
                        f"window: got a pair for {kind!r}, allowed: kinds with a range"
                    )
            windows = {kind: window.get(kind) for kind in ranges}
            inside = {kind: _find_inside(steps, windows[kind], fraction) for kind in ranges}
        else:
            inside = dict.fromkeys(ranges or KINDS, _find_inside(steps, window, fraction))
        masks = {kind: _pyramid_mask(every, inside[kind]) for kind, every in ranges.items()}
        parts = {**ranges, "window": window, "fraction": fraction}
        label = " ".join(f"{name}={value}" for name, value in parts.items() if value is not None)
        return cls(steps, masks, label=f"pyramid {label}".strip())

    @classmethod
    def from_masks(
        cls,
        timesteps: Iterable[float],
        masks: Mapping[str, Iterable[bool]],
        *,
        overrides: Iterable[Override] = (),
        label: str = "masks",
    ) -> Schedule:
        """A schedule from explicit masks: kind -> one bool per step, True where the step reuses."""
        return cls(_as_timesteps(timesteps), masks, tuple(overrides), label)  # type: ignore[arg-type]

    @classmethod
    def none(cls, timesteps: Iterable[float]) -> Schedule:
        """The schedule that reuses nothing."""
        return cls(_as_timesteps(timesteps), label="none")

    @property
    def num_steps(self) -> int:
        """Number of diffusion steps."""
        return len(self.timesteps)

    def mask(self, kind: str) -> Mask:
        """The mask of a kind, without overrides; all False if it is always computed."""
        _check_kind(kind, "kind")
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
        """A new schedule with a mask of their own for some layers; see `Override` for which.

        Give either `mask`, or the range `every` (1: always computed) with an optional `window` or
        `fraction`, as in `pyramid`.
        """
        if (mask is None) == (every is None):
            raise ValueError(
                f"override: got mask={mask!r} and every={every!r}, allowed: exactly one"
            )
        if (window is not None) + (fraction is not None) + (mask is not None) > 1:
            raise ValueError(
                "override: got several of window, fraction and mask, allowed: one of them"
            )
        if every is not None:
            inside = _find_inside(self.timesteps, window, fraction)
            mask = _pyramid_mask(_as_range(every, "every"), inside)
        override = Override(
            mask=_as_mask(mask, self.num_steps, "override mask"),
            kind=kind,
            layers=layers,  # type: ignore[arg-type]
            name=name,
        )
        return Schedule(self.timesteps, self.masks, (*self.overrides, override), self.label)

    def mask_of(self, slot: SlotSpec) -> Mask:
        """The mask that holds for one slot, overrides included."""
        for override in reversed(self.overrides):
            if override.matches(slot):
                return override.mask
        return self.mask(slot.kind)

    def unmatched(self, slots: Sequence[SlotSpec]) -> tuple[str, ...]:
        """What this schedule asks for and no slot can follow: kinds and overrides without a slot."""
        kinds = {slot.kind for slot in slots}
        missing = [f"kind {kind!r}" for kind in self.masks if kind not in kinds]
        missing += [str(o) for o in self.overrides if not any(o.matches(slot) for slot in slots)]
        return tuple(missing)

    def plan(self, slots: Sequence[SlotSpec]) -> Plan:
        """This schedule bound to a model's slots: actions, sources, lifetimes, phases."""
        columns = [self.mask_of(slot) for slot in slots]
        reuse = np.array(columns, dtype=bool).reshape(len(columns), self.num_steps).T
        return Plan.from_reuse(self.timesteps, slots, reuse)

    def to_json(self) -> str:
        """The schedule as JSON; `Schedule.from_json` gives an equal schedule back."""
        overrides = [
            {
                "kind": o.kind,
                "layers": None if o.layers is None else list(o.layers),
                "name": o.name,
                "mask": _mask_to_text(o.mask),
            }
            for o in self.overrides
        ]
        content = {
            "pabc": "schedule",
            "version": JSON_VERSION,
            "label": self.label,
            "timesteps": list(self.timesteps),
            "masks": {kind: _mask_to_text(mask) for kind, mask in self.masks.items()},
            "overrides": overrides,
        }
        return json.dumps(content, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """The schedule that `to_json` wrote. Raises `ValueError` on anything else."""
        content = load_document(text, "schedule", ("label", "timesteps", "masks", "overrides"))
        masks = {
            kind: _mask_from_text(mask, f"masks.{kind}") for kind, mask in content["masks"].items()
        }
        overrides = []
        for index, entry in enumerate(content["overrides"]):
            where = f"overrides[{index}]"
            check_fields(entry, where, ("kind", "layers", "name", "mask"))
            entry["mask"] = _mask_from_text(entry["mask"], f"{where}.mask")
            overrides.append(Override(**entry))
        return cls(tuple(content["timesteps"]), masks, tuple(overrides), content["label"])

    def __hash__(self) -> int:
        return hash((self.timesteps, tuple(self.masks.items()), self.overrides))

    def __reduce__(self) -> tuple:
        return Schedule, (self.timesteps, dict(self.masks), self.overrides, self.label)


def _pyramid_mask(every: int, inside: list[bool]) -> Mask:
    return tuple(is_inside and step % every != 0 for step, is_inside in enumerate(inside))


def _find_inside(
    timesteps: tuple[float, ...], window: Window | None, fraction: Window | None
) -> list[bool]:
    """Per step, whether it lies in the window (or fraction); all do where there is neither."""
    if fraction is not None:
        low, high = _as_pair(fraction, "fraction")
        if low < 0 or high > 1:
            raise ValueError(f"fraction: got {fraction!r}, allowed: 0 <= low < high <= 1")
        # The decimal that was written, not its binary neighbor: 0.15 of 100 steps starts at step 15.
        first, end = (Fraction(repr(bound)) * len(timesteps) for bound in (low, high))
        return [first <= step < end for step in range(len(timesteps))]
    if window is None:
        return [True] * len(timesteps)
    low, high = _as_pair(window, "window")
    is_integral = low.is_integer() and high.is_integer()
    inside = [low < (int(t) if is_integral else t) < high for t in timesteps]
    if not any(inside):
        warnings.warn(
            f"window ({low:g}, {high:g}) has none of the {len(timesteps)} timesteps in it"
            f" (from {timesteps[0]:g} to {timesteps[-1]:g}): nothing will be reused",
            stacklevel=3,
        )
    return inside


def _as_timesteps(values: Any) -> tuple[float, ...]:
    items = values.tolist() if hasattr(values, "tolist") else values
    try:
        if isinstance(items, (str, bytes, Mapping)):
            raise TypeError
        items = list(items)
        if any(isinstance(item, (str, bytes, bool)) for item in items):
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


def _as_range(value: object, name: str) -> int:
    try:
        every = 0 if isinstance(value, (bool, np.bool_)) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        every = 0
    if every < 1:
        raise ValueError(f"{name}: got range {value!r}, allowed: an integer of 1 or more, or None")
    return every


def _as_pair(value: object, name: str) -> Window:
    try:
        low, high = (float(bound) for bound in value)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise ValueError(f"{name}: got {value!r}, allowed: a pair of numbers (low, high)") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(
            f"{name}: got {value!r}, allowed: finite numbers (low, high) with low < high"
        )
    return low, high


def _as_mask(values: Any, num_steps: int | None, name: str) -> Mask:
    """The mask as a tuple of bools; its length is checked where `num_steps` is given."""
    items = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(items, str) or not isinstance(items, Iterable):
        raise ValueError(f"{name}: got {values!r}, allowed: one bool per step")
    items = tuple(items)
    for step, item in enumerate(items):
        if not isinstance(item, (bool, np.bool_)):
            raise ValueError(f"{name}: got {item!r} at step {step}, allowed: True (reuse) or False")
    if num_steps is not None and len(items) != num_steps:
        raise ValueError(f"{name}: got length {len(items)}, allowed: one per step ({num_steps})")
    if items and items[0]:
        raise ValueError(
            f"{name}: got True (reuse) at step 0, allowed: False, nothing is stored yet"
        )
    return tuple(bool(item) for item in items)


def _as_layers(values: object) -> tuple[int, ...]:
    try:
        items = list(values) if isinstance(values, Iterable) else [values]
        if any(isinstance(item, bool) for item in items):
            raise TypeError
        layers = tuple(sorted({operator.index(item) for item in items}))
    except TypeError:
        layers = ()
    if not layers or layers[0] < 0:
        raise ValueError(
            f"override layers: got {values!r}, allowed: integers of 0 or more, or None"
        )
    return layers


def _check_kind(kind: object, name: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"{name}: got kind {kind!r}, allowed: {', '.join(KINDS)}")


def _mask_to_text(mask: Mask) -> str:
    return "".join("." if reuse else "#" for reuse in mask)


def _mask_from_text(text: object, name: str) -> Mask:
    if not isinstance(text, str) or set(text) - set("#."):
        raise ValueError(
            f"{name}: got {text!r}, allowed: a string of '#' (compute) and '.' (reuse)"
        )
    return tuple(symbol == "." for symbol in text)
