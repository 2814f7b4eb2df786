"""Schedules: the kinds that a user wants to be reused, at which diffusion steps.

A `Schedule` is a boolean mask per kind over the steps that will really run (True: reuse), with
overrides for single layers, and a forecast per kind: how a reuse follows from stored values.
`Schedule.plan` binds it to the slots of a compiled model.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from pabc.base.kinds import COARSE, KINDS, check_kind
from pabc.forecasts import (
    HOLD,
    UNITS,
    Forecast,
    as_forecasts,
    choose_forecasts,
    format_forecast,
    keep_rows,
)
from pabc.overrides import Override, as_overrides, format_mask, parse_mask
from pabc.plan import Plan, SlotSpec
from pabc.steps import (
    Mask,
    Window,
    as_computed,
    find_inside,
    find_inside_per_kind,
    pyramid_mask,
)
from pabc.validate import (
    JSON_VERSION,
    as_mask,
    as_range,
    as_timesteps,
    check_choice,
    parse_document,
)

__all__ = ["KINDS", "Override", "Schedule"]


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
        units: what the polynomials go over, `"step"` or `"timestep"`.

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
        overrides = as_overrides(self.overrides)
        for override in overrides:
            as_mask(override.mask, f"mask of {override}", num_steps=len(timesteps))
        if not isinstance(self.label, str):
            raise ValueError(f"label: expected a string, found {self.label!r}")
        reused = MappingProxyType({kind: mask for kind, mask in masks.items() if any(mask)})
        object.__setattr__(self, "timesteps", timesteps)
        object.__setattr__(self, "masks", reused)
        object.__setattr__(self, "overrides", overrides)
        self._keep_forecasts()

    def _keep_forecasts(self) -> None:
        """Drops what has no effect of the forecasts.

        That is: rows of steps that do not reuse, and what holds the last value. The rule of a kind
        that is not reused stays, since an override may reuse it later.
        """
        if not isinstance(self.forecasts, Mapping):
            raise ValueError(
                f"forecasts: expected a mapping from kind to forecast, found {self.forecasts!r}"
            )
        check_choice("units", self.units, UNITS)
        kept: dict[str, Forecast] = {}
        given = as_forecasts(self.forecasts, "forecast", num_steps=self.num_steps)
        for kind, forecast in given.items():
            found = keep_rows(forecast, self._find_forecast(kind))
            if found != HOLD:
                kept[kind] = found
        overrides = tuple(
            replace(o, forecast=None)
            if o.forecast == HOLD and not any(o.kind in (None, kind) for kind in kept)
            else o
            for o in self.overrides
        )
        object.__setattr__(self, "forecasts", MappingProxyType(kept))
        object.__setattr__(self, "overrides", overrides)

    def _find_forecast(self, kind: str) -> Mask:
        """Returns the steps that may reuse a slot by the forecast of this kind."""
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
        inside = find_inside_per_kind(steps, ranges, window, fraction)
        masks = {kind: pyramid_mask(every, inside[kind]) for kind, every in ranges.items()}
        wanted = [kind for kind, every in ranges.items() if every > 1 and any(inside[kind])]
        if wanted and not any(map(any, masks.values())):
            warnings.warn(
                f"nothing is reused: the {len(steps)} steps, or those in the window, are too few "
                f"for the ranges of {', '.join(wanted)}",
                stacklevel=2,
            )
        parts: dict[str, Any] = {**ranges, "window": window, "fraction": fraction}
        forecasts = choose_forecasts(forecast, ranges, len(steps))
        if any(found != HOLD for found in forecasts.values()):
            parts["forecast"] = format_forecast(forecast)
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
        runs = as_computed(computed, len(steps))
        kinds = [kind] if isinstance(kind, str) or not isinstance(kind, Iterable) else list(kind)
        if not kinds:
            raise ValueError(f"kind: expected a kind or several, found {kind!r}")
        for name in kinds:
            check_kind(name, "kind")
        mask = tuple(step not in runs for step in range(len(steps)))
        forecasts = choose_forecasts(forecast, kinds, len(steps))
        if label is None:
            words = [*kinds, format_forecast(forecast)]
            label = f"skip {sum(mask)} of {len(steps)} {' '.join(words)}"
        masks = dict.fromkeys(kinds, mask)
        return cls(steps, masks, label=label, forecasts=forecasts, units=units)

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

        For `forecast` and `units`, see `pyramid`: one forecast is that of all kinds in `masks` and
        `overrides`.
        """
        steps, overrides = as_timesteps(timesteps), as_overrides(overrides)
        kinds = KINDS if any(o.kind is None for o in overrides) else {o.kind for o in overrides}
        given = masks if isinstance(masks, Mapping) else ()
        named = [kind for kind in KINDS if kind in kinds or kind in given]
        forecasts = choose_forecasts(forecast, named, len(steps))
        if not named and not (isinstance(forecast, str) and forecast == HOLD):
            raise ValueError(
                f"forecast: expected 'hold' without masks and overrides, found {forecast!r}; give"
                " it to the override that reuses something"
            )
        return cls(steps, masks, overrides, label, forecasts, units)  # type: ignore[arg-type]

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
            inside = find_inside(self.timesteps, window, fraction)
            mask = pyramid_mask(as_range(every, "every"), inside)
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

        Slots of coarse kinds that are never reused are left out. Raises `ValueError` if a forecast
        reads more values than are stored by then, or goes over equal timesteps.
        """
        used = [s for s in slots if s.kind not in COARSE or any(self.mask_of(s))]
        names = {slot.name for slot in used}
        kept = [
            replace(slot, outer=tuple(name for name in slot.outer if name in names))
            for slot in used
        ]
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
            "masks": {kind: format_mask(mask) for kind, mask in self.masks.items()},
            "overrides": [override.to_content() for override in self.overrides],
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
            kind: parse_mask(mask, f"masks, {kind}") for kind, mask in content["masks"].items()
        }
        overrides = [
            Override.from_content(entry, f"overrides[{index}]")
            for index, entry in enumerate(content["overrides"])
        ]
        return cls(
            content["timesteps"],
            masks,
            tuple(overrides),
            content["label"],
            content.get("forecasts", {}),
            content.get("units", "step"),
        )

    def _key(self) -> tuple[object, ...]:
        """Returns what the schedule does: rules of kinds that are not reused make no difference."""
        used = {k: f for k, f in self.forecasts.items() if any(self._find_forecast(k))}
        named = [*used.values(), *(override.forecast for override in self.overrides)]
        has_rules = any(isinstance(f, str) and f != HOLD for f in named)
        masks, forecasts = tuple(self.masks.items()), tuple(used.items())
        return self.timesteps, masks, forecasts, self.overrides, has_rules and self.units

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Schedule) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __reduce__(self) -> tuple[object, ...]:
        return Schedule, (
            self.timesteps,
            dict(self.masks),
            self.overrides,
            self.label,
            dict(self.forecasts),
            self.units,
        )
