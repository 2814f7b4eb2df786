"""Plans: the action of each diffusion step on each slot, lifetimes of values, and phases.

A plan is pure data, made before anything runs. All of it follows from one boolean table, which
steps reuse which slots, and from the slots' forecasts (`Plan.from_reuse`): plans with the same
timesteps, slots, table and forecasts are equal.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from pabc.base.format import format_bytes, format_numbers
from pabc.base.kinds import COARSE, KINDS, check_kind
from pabc.forecasts import HOLD, NUM_POINTS, UNITS, Forecast, as_forecast, keep_rows
from pabc.lifetimes import (
    HELD,
    Reading,
    Readings,
    count_live,
    find_frees,
    find_readings,
    find_until,
    weigh_rule,
)
from pabc.validate import JSON_VERSION, as_timesteps, check_choice, check_fields, parse_document


class Action(enum.IntEnum):
    """The action of one step on one slot; the numbers are those of `Plan.actions`."""

    COMPUTE = 0
    """Compute the region; no later step reads the value."""
    STORE = 1
    """Compute the region and keep the value for a later step."""
    REUSE = 2
    """Read kept values; the region does not run."""
    COVERED = 3
    """A coarser region that contains the region is reused: it neither runs nor is it read."""


_SYMBOLS = {Action.COMPUTE: "#", Action.STORE: "+", Action.REUSE: ".", Action.COVERED: "-"}
_FORECAST = "~"
_LEGEND = {_FORECAST: "~ forecast", _SYMBOLS[Action.COVERED]: "- covered by a coarser reuse"}
_NOTHING = Reading((), ())


@dataclass(frozen=True, slots=True)
class SlotSpec:
    """One place where a cut is kept between steps.

    `layer` is the ordinal, in execution order, of the slot's region among the regions of its kind;
    the slots of one region share it. `nbytes` is the size of one stored value. `outer` names the
    slots of all coarser regions that contain this one. Raises `ValueError` on an unknown kind, or a
    number that is no integer of 0 or more.
    """

    name: str
    kind: str
    layer: int
    nbytes: int = 0
    outer: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.outer, str) or not all(isinstance(name, str) for name in self.outer):
            raise ValueError(
                f"slot {self.name!r}: expected outer to be names of slots, found {self.outer!r}"
            )
        object.__setattr__(self, "outer", tuple(self.outer))
        check_kind(self.kind, f"slot {self.name!r}")
        for field, value in (("layer", self.layer), ("nbytes", self.nbytes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(
                    f"slot {self.name!r}: expected {field} to be an integer of 0 or more, "
                    f"found {value!r}"
                )


@dataclass(frozen=True, slots=True)
class Phase:
    """Steps that reuse the same slots, and so run the same specialized module.

    `reused` and `stored` are ascending slot indices. There is one phase per distinct *reused* set,
    not per distinct action vector: `stored` joins what any of its steps stores, and at a step whose
    action is `COMPUTE` the runtime drops the value. So there are fewer modules (five for a 2/4/6
    pyramid), at no cost, since the tensor at a cut is materialized anyway.
    """

    index: int
    reused: tuple[int, ...]
    stored: tuple[int, ...]
    steps: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """A schedule bound to slots: one action per step and slot. Build it with `Plan.from_reuse`.

    Reuse never reads a slot that was not stored. A value is stored only if a later step reads it,
    and is freed after its last read. Where a slot's `outer` one is reused, the slot is covered.

    Attributes:
        timesteps: one per step, as they are run.
        slots: the columns of `actions` and `sources`.
        actions: int8 [num_steps, num_slots], values of `Action`; read-only.
        sources: int32 [num_steps, num_slots], the step whose value a reuse reads, the newest of
            them where it reads several, else -1; read-only.
        frees: per step, the slots of which a value is dead after that step.
        phases: in order of their first step.
        phase_of_step: int32 [num_steps], index into `phases`; read-only.
        depths: per slot, 0 if every reuse takes the last value as it is, else the largest number of
            values that one reads: the slot keeps that many.
        forecasts: per slot, `"hold"`, the rule of its polynomials, or rows of weights.
        units: what the polynomials go over, `"step"` or `"timestep"`.
    """

    timesteps: tuple[float, ...]
    slots: tuple[SlotSpec, ...]
    actions: npt.NDArray[np.int8]
    sources: npt.NDArray[np.int32]
    frees: tuple[tuple[int, ...], ...]
    phases: tuple[Phase, ...]
    phase_of_step: npt.NDArray[np.int32]
    depths: tuple[int, ...]
    forecasts: tuple[Forecast, ...]
    units: str
    until: npt.NDArray[np.int32]
    """The last step that may read a value computed at each step, int32 [num_steps, num_slots];
    -1: none. It is defined for steps that do not compute, too, which compute the value if none was
    stored. Read-only."""
    _readings: tuple[Readings, ...]

    @classmethod
    def from_reuse(
        cls,
        timesteps: Sequence[float],
        slots: Sequence[SlotSpec],
        reuse: npt.ArrayLike,
        forecasts: Sequence[Forecast] | None = None,
        units: str = "step",
    ) -> Plan:
        """Returns the plan in which step i reuses slot j where `reuse[i, j]`, else computes it.

        Args:
            timesteps: one per step.
            slots: where cuts are kept.
            reuse: boolean [num_steps, num_slots]. A slot is covered where one of its `outer` slots
                is True.
            forecasts: per slot, a rule, or an array of weights, one row per step. None: all hold.
            units: what polynomials go over.

        Raises `ValueError` on a wrong shape, two slots of one name, reuse at step 0, or a step that
        would read more values than were computed before it.
        """
        timesteps, slots, table = as_timesteps(timesteps), tuple(slots), np.asarray(reuse)
        _check_table(timesteps, slots, table)
        covered = _find_covered(slots, table)
        reads, computed = table & ~covered, ~table & ~covered
        wanted = _check_forecasts(forecasts, slots, len(timesteps))
        check_choice("units", units, UNITS)
        positions = range(len(timesteps)) if units == "step" else timesteps
        readings = _read_all(slots, reads, computed, wanted, positions)
        until = find_until(readings, len(timesteps))
        actions = np.where(reads, Action.REUSE, Action.COMPUTE).astype(np.int8)
        actions[computed & (until >= 0)] = Action.STORE
        actions[covered] = Action.COVERED
        sources = np.full(table.shape, -1, dtype=np.int32)
        for step, slot in np.argwhere(reads):
            sources[step, slot] = readings[slot][step].sources[0]
        phases, phase_of_step = _find_phases(actions)
        for array in (actions, sources, phase_of_step, until):
            array.setflags(write=False)
        kept = tuple(map(_canonical, wanted, readings, reads.T))
        return cls(
            timesteps,
            slots,
            actions,
            sources,
            find_frees(computed, until),
            phases,
            phase_of_step,
            depths=tuple(map(_find_depth, readings)),
            forecasts=kept,
            units=units if any(f in NUM_POINTS for f in kept) else "step",
            until=until,
            _readings=readings,
        )

    @property
    def num_steps(self) -> int:
        """Number of diffusion steps."""
        return len(self.timesteps)

    @property
    def reuse(self) -> npt.NDArray[np.bool_]:
        """Boolean [num_steps, num_slots]: where the action is `REUSE`."""
        return self.actions == Action.REUSE

    @property
    def computed(self) -> npt.NDArray[np.bool_]:
        """Boolean [num_steps, num_slots]: where the region runs: neither reused nor covered."""
        return self.actions < Action.REUSE

    @property
    def num_model_calls(self) -> int:
        """Number of steps at which the model runs, in part at least: its output is not reused."""
        models = [j for j, slot in enumerate(self.slots) if slot.kind == "model"]
        return self.num_steps - int(self.reuse[:, models].any(axis=1).sum())

    def history(self, step: int, slot: int) -> tuple[int, ...]:
        """Returns the steps whose values a step reads of a slot, the newest first; () if none."""
        return self._readings[slot].get(step, _NOTHING).sources

    def weights(self, step: int, slot: int) -> tuple[float, ...]:
        """Returns the weights of the values that a step reads, as in `history`."""
        return self._readings[slot].get(step, _NOTHING).weights

    def weigh(self, step: int, slot: int, sources: Sequence[int]) -> tuple[float, ...] | None:
        """Returns the weights at `step` of values that other steps computed than was planned.

        `sources` are these steps, newest first, at least one. A rule weighs the newest of them, as
        many as its polynomial goes through, and the others by 0. None if there are no weights for
        them: given weights hold for the planned values alone, and equal timesteps have none.
        """
        forecast, planned = self.forecasts[slot], self.history(step, slot)
        if isinstance(forecast, str):
            positions = range(self.num_steps) if self.units == "step" else self.timesteps
            return weigh_rule(forecast, step, sources, positions)
        if planned and tuple(sources[: len(planned)]) == planned:
            return self.weights(step, slot) + (0.0,) * (len(sources) - len(planned))
        return None

    @property
    def bytes_at(self) -> npt.NDArray[np.int64]:
        """Bytes of stored values at the fullest moment of each step, int64 [num_steps].

        Counts the values that the step reads or stores, and those that a later one reads. Values
        that a phase computes but does not store are activations, which are not counted.
        """
        sizes = np.array([slot.nbytes for slot in self.slots], dtype=np.int64)
        return (count_live(self.computed, self.until) * sizes).sum(axis=1, dtype=np.int64)

    @property
    def peak_bytes(self) -> int:
        """Bytes of stored values at the fullest moment of the generation."""
        return int(self.bytes_at.max())

    def reuse_fraction(self, kind: str | None = None) -> float:
        """Returns the share of (step, slot) pairs of a kind, or of all, that reuse; 0.0 if none."""
        if kind is not None:
            check_kind(kind, "kind")
        columns = [j for j, slot in enumerate(self.slots) if kind in (None, slot.kind)]
        return float(self.reuse[:, columns].mean()) if columns else 0.0

    def digest(self) -> str:
        """Returns the SHA-256, as hex, of timesteps, slots and actions.

        Ranks compare it to make sure that they follow one plan. Bytes per slot are left out: shards
        may have unequal sizes.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        content = self._content()
        for slot in content["slots"]:
            del slot["nbytes"]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        """Returns the plan as JSON, from which `Plan.from_json` makes an equal one."""
        return json.dumps(self._content(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Returns the plan that `to_json` wrote. Raises `ValueError` on anything else."""
        content = parse_document(text, "plan", {"timesteps": list, "slots": list}, {"units": str})
        timesteps, slots, columns = as_timesteps(content["timesteps"]), [], []
        forecasts: list[Forecast] = []
        for index, entry in enumerate(content["slots"]):
            check_fields(entry, f"slots[{index}]", _FIELDS, ("outer", *_READ_FIELDS))
            columns.append(_check_column(entry.pop("actions"), index, len(timesteps)))
            forecasts.append(_parse_forecast(entry, columns[-1], f"slots[{index}]"))
            slots.append(SlotSpec(**{f: v for f, v in entry.items() if f not in _READ_FIELDS}))
        reuse = np.array([[symbol in ".~" for symbol in column] for column in columns], dtype=bool)
        table = reuse.reshape(len(slots), len(timesteps)).T
        plan = cls.from_reuse(timesteps, slots, table, forecasts, content.get("units", "step"))
        for index, column in enumerate(columns):
            if plan._column(index) != column:
                raise ValueError(
                    f"slots[{index}].actions: expected '+' exactly where a later step reads the"
                    f" value, {plan._column(index)!r}, found {column!r}"
                )
        return plan

    def _column(self, slot: int) -> str:
        weights = [self.weights(step, slot) for step in range(self.num_steps)]
        return "".join(
            _FORECAST if weights[step] not in ((), HELD) else _SYMBOLS[Action(action)]
            for step, action in enumerate(self.actions[:, slot])
        )

    def _content(self) -> dict[str, Any]:
        head: dict[str, Any] = {"pabc": "plan", "version": JSON_VERSION}
        head["timesteps"] = list(self.timesteps)
        if self.units != "step":
            head["units"] = self.units
        return {**head, "slots": [self._slot_content(j) for j in range(len(self.slots))]}

    def _slot_content(self, index: int) -> dict[str, Any]:
        slot, forecast = self.slots[index], self.forecasts[index]
        content: dict[str, Any] = {"name": slot.name, "kind": slot.kind, "layer": slot.layer}
        content |= {"nbytes": slot.nbytes, "actions": self._column(index)}
        if slot.outer:
            content["outer"] = list(slot.outer)
        if forecast != HOLD:
            readings = self._readings[index].values()
            content["forecast"] = forecast if isinstance(forecast, str) else "weights"
            content["sources"] = [list(reading.sources) for reading in readings]
            content["weights"] = [list(reading.weights) for reading in readings]
        return content

    def _key(self) -> tuple[object, ...]:
        return self.timesteps, self.slots, self.actions.tobytes(), self.forecasts, self.units

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Plan) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __reduce__(self) -> tuple[object, ...]:
        return Plan.from_reuse, (
            self.timesteps,
            self.slots,
            self.reuse,
            self.forecasts,
            self.units,
        )

    def __str__(self) -> str:
        """Returns a table: a row per kind (or group of slots that act alike), a column per step.

        `#` compute, `+` compute and store, `.` reuse, `~` reuse by a forecast, `-` covered; the
        last row gives each step's phase. Coarse slots that are never reused are left out.
        """
        rows = [*_table_rows(self), ("phase", "".join(map(_digit, self.phase_of_step)))]
        width = max(len(label) for label, _ in rows)
        shown = [self.slots[j] for j in _find_shown(self)]
        kinds = sorted({slot.kind for slot in shown}, key=KINDS.index)
        reused = ", ".join(f"{kind} {self.reuse_fraction(kind):.0%}" for kind in kinds)
        symbols = {symbol for _, column in rows[:-1] for symbol in column}
        new = [text for symbol, text in _LEGEND.items() if symbol in symbols]
        return "\n".join(
            [
                f"plan: {self.num_steps} steps, t = {self.timesteps[0]:g} to"
                f" {self.timesteps[-1]:g}, {len(shown)} slots;"
                f" {', '.join(['# compute, + compute and store, . reuse', *new])}",
                *(f"  {label:<{width}}  {column}" for label, column in rows),
                f"  {len(self.phases)} phases; reused: {reused or 'nothing'};"
                f" peak {format_bytes(self.peak_bytes)}",
            ]
        )


def _check_table(
    timesteps: tuple[float, ...], slots: tuple[SlotSpec, ...], table: npt.NDArray[Any]
) -> None:
    names = [slot.name for slot in slots]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"slots: expected one slot per name, found {name!r} twice")
    shape = (len(timesteps), len(slots))
    if table.dtype != np.bool_ or table.shape != shape:
        raise ValueError(
            f"reuse: expected bool [num_steps, num_slots] = {list(shape)}, found {table.dtype}"
            f" {list(table.shape)}"
        )
    for slot in np.nonzero(table[0])[0]:
        raise ValueError(
            f"reuse: expected reuse from step 1 on, found slot {names[slot]!r} reused at step 0"
        )


def _check_column(column: object, index: int, num_steps: int) -> str:
    symbols = "'#', '+', '.', '~' and '-'"
    if not isinstance(column, str) or set(column) - {*_SYMBOLS.values(), _FORECAST}:
        raise ValueError(
            f"slots[{index}].actions: expected a string of {symbols}, found {column!r}"
        )
    if len(column) != num_steps:
        raise ValueError(
            f"slots[{index}].actions: expected one per step ({num_steps}), found {len(column)}"
        )
    return column


def _find_covered(slots: Sequence[SlotSpec], reuse: npt.NDArray[np.bool_]) -> Any:
    index = {slot.name: j for j, slot in enumerate(slots)}
    covered = np.zeros_like(reuse)
    for j, slot in enumerate(slots):
        for name in slot.outer:
            if name not in index or name == slot.name:
                raise ValueError(
                    f"slot {slot.name!r}: expected outer to name other slots, found {name!r}"
                )
            missing = set(slots[index[name]].outer) - set(slot.outer)
            if missing:
                raise ValueError(
                    f"slot {slot.name!r}: expected outer to name what contains {name!r}, too,"
                    f" found no {min(missing)!r}"
                )
            covered[:, j] |= reuse[:, index[name]]
    return covered


def _check_forecasts(
    forecasts: Sequence[Forecast] | None, slots: Sequence[SlotSpec], num_steps: int
) -> tuple[Forecast, ...]:
    given = (HOLD,) * len(slots) if forecasts is None else tuple(forecasts)
    if len(given) != len(slots):
        raise ValueError(f"forecasts: expected one per slot ({len(slots)}), found {len(given)}")
    return tuple(
        as_forecast(forecast, f"forecast of {slot.name!r}", num_steps=num_steps)
        for forecast, slot in zip(given, slots, strict=True)
    )


def _read_all(
    slots: Sequence[SlotSpec],
    reads: npt.NDArray[np.bool_],
    computed: npt.NDArray[np.bool_],
    forecasts: Sequence[Forecast],
    positions: Sequence[float],
) -> tuple[Readings, ...]:
    """Returns what each step reads of each slot; slots that act alike share it."""
    shared: dict[object, Readings] = {}
    readings = []
    for j, (slot, forecast) in enumerate(zip(slots, forecasts, strict=True)):
        key = reads[:, j].tobytes(), computed[:, j].tobytes(), forecast
        if key not in shared:
            columns = reads[:, j].tolist(), computed[:, j].tolist()
            shared[key] = find_readings(*columns, forecast, positions, slot.kind)
        readings.append(shared[key])
    return tuple(readings)


def _find_depth(readings: Readings) -> int:
    if all(reading.weights == HELD for reading in readings.values()):
        return 0
    return max(len(reading.sources) for reading in readings.values())


def _canonical(forecast: Forecast, readings: Readings, reuse: npt.NDArray[np.bool_]) -> Forecast:
    return keep_rows(forecast, reuse) if _find_depth(readings) else HOLD


_FIELDS = ("name", "kind", "layer", "nbytes", "actions")
_READ_FIELDS = ("forecast", "sources", "weights")


def _parse_forecast(entry: dict[str, Any], column: str, where: str) -> Forecast:
    if "forecast" not in entry:
        return HOLD
    forecast: Forecast = entry["forecast"]
    if forecast != "weights":
        return forecast
    rows = iter(entry["weights"])
    return as_forecast([next(rows) if s in ".~" else () for s in column], where)


def _find_phases(
    actions: npt.NDArray[np.int8],
) -> tuple[tuple[Phase, ...], npt.NDArray[np.int32]]:
    steps_of: dict[bytes, list[int]] = {}
    for step, row in enumerate(actions == Action.REUSE):
        steps_of.setdefault(row.tobytes(), []).append(step)
    phase_of_step = np.zeros(len(actions), dtype=np.int32)
    phases = []
    for index, steps in enumerate(steps_of.values()):
        phase_of_step[steps] = index
        reused = np.nonzero(actions[steps[0]] == Action.REUSE)[0].tolist()
        stored = np.nonzero((actions[steps] == Action.STORE).any(axis=0))[0].tolist()
        phases.append(Phase(index, tuple(reused), tuple(stored), tuple(steps)))
    return tuple(phases), phase_of_step


def _find_shown(plan: Plan) -> list[int]:
    """Returns the slots that are told about: all but coarse ones that are never reused."""
    reused = plan.reuse.any(axis=0)
    return [j for j, slot in enumerate(plan.slots) if reused[j] or slot.kind not in COARSE]


def _table_rows(plan: Plan) -> list[tuple[str, str]]:
    groups: dict[tuple[str, str], set[int]] = {}
    for index in _find_shown(plan):
        slot = plan.slots[index]
        groups.setdefault((slot.kind, plan._column(index)), set()).add(slot.layer)
    kinds = [kind for kind, _ in groups]
    return [
        (kind if kinds.count(kind) == 1 else f"{kind} {format_numbers(layers)}", column)
        for (kind, column), layers in groups.items()
    ]


def _digit(phase: int) -> str:
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    return digits[phase] if phase < len(digits) else "*"
