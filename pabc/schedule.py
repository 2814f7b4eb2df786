"""Schedules: the kinds that a user wants to be reused, at which diffusion steps.

A `Schedule` is a boolean mask per kind over the steps that will really run (True: reuse), with
overrides for single layers, and a forecast per kind: how a reuse follows from stored values.
`Schedule.plan` binds it to the slots of a compiled model.
"""

from __future__ import annotations

import fnmatch
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import numpy as np

from pabc.base.kinds import COARSE, KINDS, check_kind
from pabc.forecasts import (
    HOLD,
    NUM_POINTS,
    UNITS,
    Forecast,
    as_forecast,
    as_forecasts,
    keep_rows,
)
from pabc.plan import Plan, SlotSpec
from pabc.validate import (
    JSON_VERSION,
    as_computed,
    as_layers,
    as_mask,
    as_pair,
    as_range,
    as_timesteps,
    check_choice,
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


@dataclass(frozen=True)
class Schedule:
    """The kinds that are reused at each step. Immutable, hashable, picklable.

    Attributes:
        timesteps: one per step, in the order in which they are run; any order, repeats allowed.
        masks: kind -> one bool per step, True where the step reuses. A mask without True is
            dropped: a kind that is absent is computed at every step.
        overrides: masks for single layers; where several match a slot, the last one holds.
        label: a name for people; equality ignores it.
        forecasts: kind -> `"linear"`, `"quadratic"`, or rows of weights, one per step, newest value
            first; the rows of steps that do not reuse are empty. A kind that is absent holds the
            last value, or is never reused.
        units: what the polynomials go over, `"step"` or `"timestep"`; `"step"` without any.

    Raises `ValueError`, with what was expected and what was found, on anything malformed.
    """

    timesteps: tuple[float, ...]
    masks: Mapping[str, Mask] = field(default_factory=dict)
    overrides: tuple[Override, ...] = ()
    label: str = field(default="", compare=False)
    forecasts: Mapping[str, Forecast] = field(default_factory=dict)
    units: str = "step"

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
        self._keep_forecasts()

    def _keep_forecasts(self) -> None:
        """Drops forecasts without an effect, so that schedules that do the same are equal."""
        if not isinstance(self.forecasts, Mapping):
            raise ValueError(
                f"forecasts: expected a mapping from kind to forecast, found {self.forecasts!r}"
            )
        check_choice("units", self.units, UNITS)
        given = as_forecasts(self.forecasts, "forecast", num_steps=self.num_steps)
        kept = {kind: keep_rows(given[kind], self._mask_of_forecast(kind)) for kind in given}
        used = {
            kind: forecast
            for kind, forecast in kept.items()
            if forecast != HOLD and any(self._mask_of_forecast(kind))
        }
        named = [*used.values(), *(override.forecast for override in self.overrides)]
        object.__setattr__(self, "forecasts", MappingProxyType(used))
        if not any(isinstance(f, str) and f in NUM_POINTS for f in named):
            object.__setattr__(self, "units", "step")

    def _mask_of_forecast(self, kind: str) -> Mask:
        """Returns where slots of a kind may be reused with the kind's forecast."""
        masks = [self.mask(kind)]
        masks += [o.mask for o in self.overrides if o.kind in (None, kind) and o.forecast is None]
        return tuple(map(any, zip(*masks, strict=True)))

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
        block: int | None = None,
        stack: int | None = None,
        model: int | None = None,
        window: Window | Mapping[str, Window] | None = None,
        fraction: Window | None = None,
        forecast: Any = HOLD,
        units: str = "step",
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

        `forecast` is how a reuse follows from stored values: `"hold"`, the last one as it is;
        `"linear"` or `"quadratic"`, the polynomial through the last two or three, over the index
        of the step (`units="timestep"`: over the timestep), of lower order while fewer are stored;
        an array of weights [num_steps, k], newest value first; or a mapping from kind to one of
        these (a kind without one holds).

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
            "block": block,
            "stack": stack,
            "model": model,
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
        parts: dict[str, Any] = {**ranges, "window": window, "fraction": fraction}
        forecasts = _forecasts_of(forecast, ranges, len(steps))
        if any(word != HOLD for word in forecasts.values()):
            parts |= {"forecast": _format_forecast(forecast), "units": units}
        words = [f"{name}={value}" for name, value in parts.items() if value is not None]
        label = " ".join(["pyramid", *words])
        return cls(steps, masks, label=label, forecasts=forecasts, units=units)

    @classmethod
    def skip(
        cls,
        timesteps: Iterable[float],
        computed: Iterable[int] | int,
        *,
        kind: str | Iterable[str] = "model",
        forecast: Any = "linear",
        units: str = "step",
        label: str | None = None,
    ) -> Schedule:
        """Returns the schedule that computes a kind at some steps, and forecasts it at the others.

        Args:
            timesteps: those that will be run, one per step (a sequence, array or tensor).
            computed: the indices of the steps that compute, 0 among them; or how many compute.
                A number n of N steps stands for the first and the last 15 % of the steps,
                `round(0.15 * N)` at each end, but at most n // 3 and at least one (the last step
                where n is 2 or more), and the rest evenly between.
            kind: what is skipped, one kind or several; `"model"` is the whole call.
            forecast, units: as in `pyramid`.
            label: a name for people, in place of one that names the settings.

        Raises `ValueError` on bad values.
        """
        steps = as_timesteps(timesteps)
        runs = as_computed(computed, "computed", len(steps))
        kinds = [kind] if isinstance(kind, str) else list(kind)
        for name in kinds:
            check_kind(name, "kind")
        mask = tuple(step not in runs for step in range(len(steps)))
        forecasts = _forecasts_of(forecast, kinds, len(steps))
        words = [*kinds, _format_forecast(forecast), *(["timestep"] if units != "step" else [])]
        named = f"skip {sum(mask)} of {len(steps)} {' '.join(map(str, words))}"
        return cls(
            steps,
            dict.fromkeys(kinds, mask),
            label=named if label is None else label,
            forecasts=forecasts,
            units=units,
        )

    @classmethod
    def from_masks(
        cls,
        timesteps: Iterable[float],
        masks: Mapping[str, Iterable[bool]],
        *,
        overrides: Iterable[Override] = (),
        forecast: Any = HOLD,
        units: str = "step",
        label: str = "masks",
    ) -> Schedule:
        """Returns a schedule from masks: kind -> one bool per step, True where it reuses.

        For `forecast` and `units`, see `pyramid`.
        """
        steps = as_timesteps(timesteps)
        forecasts = as_forecasts(forecast, "forecast", num_steps=len(steps))
        return cls(steps, masks, tuple(overrides), label, forecasts, units)  # type: ignore[arg-type]

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
        forecast: Any = None,
    ) -> Schedule:
        """Returns a new schedule with another mask for some slots; see `Override` for which.

        Give either `mask`, or the range `every` (1: always computed) with an optional `window` or
        `fraction`, as in `pyramid`. `forecast` is `"hold"`, a rule or an array, as there; None: the
        forecast of the slot's kind.
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
        override = Override(
            mask=checked,
            kind=kind,
            layers=layers,  # type: ignore[arg-type]
            name=name,
            forecast=forecast,
        )
        return replace(self, overrides=(*self.overrides, override))

    def mask_of(self, slot: SlotSpec) -> Mask:
        """Returns the mask of one slot, overrides included."""
        override = self._override_of(slot)
        return self.mask(slot.kind) if override is None else override.mask

    def forecast_of(self, slot: SlotSpec) -> Forecast:
        """Returns the forecast of one slot, overrides included."""
        override = self._override_of(slot)
        if override is not None and override.forecast is not None:
            return override.forecast
        return self.forecasts.get(slot.kind, HOLD)

    def _override_of(self, slot: SlotSpec) -> Override | None:
        return next((o for o in reversed(self.overrides) if o.matches(slot)), None)

    def unmatched(self, slots: Sequence[SlotSpec]) -> tuple[str, ...]:
        """Returns the kinds and overrides of this schedule that match none of `slots`."""
        kinds = {slot.kind for slot in slots}
        missing = [f"kind {kind!r}" for kind in self.masks if kind not in kinds]
        missing += [str(o) for o in self.overrides if not any(o.matches(slot) for slot in slots)]
        return tuple(missing)

    def plan(self, slots: Sequence[SlotSpec]) -> Plan:
        """Binds this schedule to a model's slots: actions, sources, lifetimes, phases.

        Coarse slots at the end that are never reused are left out, so that the others keep their
        index. Raises `ValueError` if a forecast reads more values than are stored by then, or
        polynomials go over equal timesteps.
        """
        kept = _drop_unused(slots, [any(self.mask_of(slot)) for slot in slots])
        columns = [self.mask_of(slot) for slot in kept]
        reuse = np.array(columns, dtype=bool).reshape(len(columns), self.num_steps).T
        forecasts = [self.forecast_of(slot) for slot in kept]
        return Plan.from_reuse(self.timesteps, kept, reuse, forecasts, self.units)

    def to_json(self) -> str:
        """Returns the schedule as JSON, from which `Schedule.from_json` makes an equal one."""
        content: dict[str, Any] = {
            "pabc": "schedule",
            "version": JSON_VERSION,
            "label": self.label,
            "timesteps": self.timesteps,
            "masks": {kind: _format_mask(mask) for kind, mask in self.masks.items()},
            "overrides": [_format_override(override) for override in self.overrides],
        }
        if self.forecasts:
            content["forecasts"] = dict(self.forecasts)
        if self.units != "step":
            content["units"] = self.units
        return json.dumps(content, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Returns the schedule that `to_json` wrote. Raises `ValueError` on anything else."""
        fields = {"label": str, "timesteps": list, "masks": dict, "overrides": list}
        optional = {"forecasts": dict, "units": str}
        content = parse_document(text, "schedule", fields, optional)
        masks = {
            kind: _parse_mask(mask, f"masks, {kind}") for kind, mask in content["masks"].items()
        }
        overrides = []
        for index, entry in enumerate(content["overrides"]):
            where = f"overrides[{index}]"
            check_fields(entry, where, ("kind", "layers", "name", "mask"), ("forecast",))
            overrides.append(Override(**{**entry, "mask": _parse_mask(entry["mask"], where)}))
        return cls(
            content["timesteps"],
            masks,
            tuple(overrides),
            content["label"],
            content.get("forecasts", {}),
            content.get("units", "step"),
        )

    def __hash__(self) -> int:
        per_kind = tuple(self.masks.items()), tuple(self.forecasts.items())
        return hash((self.timesteps, *per_kind, self.overrides, self.units))

    def __reduce__(self) -> tuple[object, ...]:
        per_kind = dict(self.masks), dict(self.forecasts)
        return Schedule, (
            self.timesteps,
            per_kind[0],
            self.overrides,
            self.label,
            per_kind[1],
            self.units,
        )


def _drop_unused(slots: Sequence[SlotSpec], reused: Sequence[bool]) -> tuple[SlotSpec, ...]:
    """Returns the slots without the coarse ones at the end that are not reused."""
    num_kept = max(
        (j + 1 for j, slot in enumerate(slots) if reused[j] or slot.kind not in COARSE), default=0
    )
    names = {slot.name for slot in slots[:num_kept]}
    return tuple(
        replace(slot, outer=tuple(name for name in slot.outer if name in names))
        for slot in slots[:num_kept]
    )


def _forecasts_of(forecast: Any, kinds: Iterable[str], num_steps: int) -> dict[str, Forecast]:
    """Returns kind -> forecast for these kinds. Raises if a mapping names others."""
    forecasts = as_forecasts(forecast, "forecast", num_steps=num_steps)
    if isinstance(forecast, Mapping):
        for kind in forecasts:
            if kind not in kinds:
                raise ValueError(
                    f"forecast: expected forecasts of kinds with a range, found one of {kind!r}"
                )
    return {kind: found for kind, found in forecasts.items() if kind in kinds}


def _format_forecast(forecast: Any) -> Any:
    if isinstance(forecast, Mapping):
        return {kind: _format_forecast(value) for kind, value in forecast.items()}
    return forecast if isinstance(forecast, str) else "weights"


def _format_override(override: Override) -> dict[str, Any]:
    content: dict[str, Any] = {"kind": override.kind, "layers": override.layers}
    content |= {"name": override.name, "mask": _format_mask(override.mask)}
    if override.forecast is not None:
        content["forecast"] = override.forecast
    return content


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
