"""Plans: the action of each diffusion step on each slot, lifetimes of values, and phases.

A plan is pure data, made before anything runs. All of it follows from one boolean table, which
steps reuse which slots, and from the slots' forecasts (`Plan.from_reuse`): plans with the same
timesteps, slots, table and forecasts are equal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from pabc.base.format import format_bytes
from pabc.base.kinds import KINDS, check_kind
from pabc.columns import (
    FIELDS,
    READS,
    check_column,
    check_readings,
    format_column,
    format_legend,
    format_phases,
    group_columns,
    parse_column,
    parse_readings,
    write_readings,
)
from pabc.forecasts import HOLD, UNITS, Forecast, as_forecast, keep_rows
from pabc.lifetimes import (
    Reading,
    Readings,
    count_live,
    find_depth,
    find_frees,
    find_readings,
    find_sources,
    find_until,
    weigh_rule,
)
from pabc.slots import Action, SlotSpec, find_covered
from pabc.validate import JSON_VERSION, as_timesteps, check_choice, check_fields, parse_document

__all__ = ["Action", "Phase", "Plan", "SlotSpec"]

_FIELDS = ("name", "kind", "layer", "nbytes", "actions")
_NOTHING = Reading((), ())


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
        until: int32 [num_steps, num_slots], the last step that may read a value computed at each
            step, else -1; read-only. It is defined for steps that do not compute, too: they compute
            the value if none was stored.
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
        covered = find_covered({slot.name: slot.outer for slot in slots}, table)
        reads, computed = table & ~covered, ~table & ~covered
        wanted = _check_forecasts(forecasts, slots, len(timesteps))
        check_choice("units", units, UNITS)
        positions = range(len(timesteps)) if units == "step" else timesteps
        kinds = [slot.kind for slot in slots]
        readings = find_readings(kinds, reads, computed, wanted, positions)
        until = find_until(readings, len(timesteps))
        actions = np.where(reads, Action.REUSE, Action.COMPUTE).astype(np.int8)
        actions[computed & (until >= 0)] = Action.STORE
        actions[covered] = Action.COVERED
        sources = find_sources(readings, len(timesteps))
        phases, phase_of_step = _find_phases(actions)
        for array in (actions, sources, phase_of_step, until):
            array.setflags(write=False)
        depths = tuple(map(find_depth, readings))
        kept = tuple(
            keep_rows(forecast, column) if depth else HOLD
            for forecast, column, depth in zip(wanted, reads.T.tolist(), depths, strict=True)
        )
        return cls(
            timesteps,
            slots,
            actions,
            sources,
            find_frees(computed, until),
            phases,
            phase_of_step,
            depths=depths,
            forecasts=kept,
            units=units if any(isinstance(f, str) and f != HOLD for f in kept) else "step",
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
        """Number of steps at which the model runs: those that do not reuse its output."""
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

    def without(self, slots: Collection[int]) -> Plan:
        """Returns the plan in which these slots are computed where they are reused.

        What they contain is computed there, too. A step with given weights computes if it would
        find other values than those that the weights are for.
        """
        reuse = self.reuse
        reuse[:, list(slots)] = False
        while True:
            plan = Plan.from_reuse(self.timesteps, self.slots, reuse, self.forecasts, self.units)
            stale = [
                (step, slot)
                for slot, forecast in enumerate(self.forecasts)
                if not isinstance(forecast, str)
                for step, reading in plan._readings[slot].items()
                if reading.sources != self.history(step, slot)
            ]
            if not stale:
                return plan
            for step, slot in stale:
                reuse[step, slot] = False

    @property
    def num_kept(self) -> npt.NDArray[np.int64]:
        """Values of each slot that are kept at the fullest moment of each step, int64 [num_steps,
        num_slots]."""
        return count_live(self.computed, self.until)

    @property
    def bytes_at(self) -> npt.NDArray[np.int64]:
        """Bytes of stored values at the fullest moment of each step, int64 [num_steps].

        Counts the values that the step reads or stores, and those that a later one reads. Values
        that a phase computes but does not store are activations, which are not counted.
        """
        sizes = np.array([slot.nbytes for slot in self.slots], dtype=np.int64)
        return (self.num_kept * sizes).sum(axis=1, dtype=np.int64)

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
        """Returns the SHA-256, as hex, of timesteps, slots, actions and forecasts.

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
        timesteps = as_timesteps(content["timesteps"])
        slots, columns, stated = [], [], []
        for index, entry in enumerate(content["slots"]):
            where = f"slots[{index}]"
            check_fields(entry, where, _FIELDS, ("outer", *FIELDS))
            columns.append(parse_column(entry.pop("actions"), where, len(timesteps)))
            fields = {name: entry.pop(name) for name in FIELDS if name in entry}
            stated.append(parse_readings(fields, columns[-1], entry["name"]))
            slots.append(SlotSpec(**entry))
        reuse = np.array([[symbol in READS for symbol in column] for column in columns], dtype=bool)
        table = reuse.reshape(len(slots), len(timesteps)).T
        forecasts = [forecast for forecast, _ in stated]
        plan = cls.from_reuse(timesteps, slots, table, forecasts, content.get("units", "step"))
        for index, (_, readings) in enumerate(stated):
            check_readings(readings, plan._readings[index], slots[index].name)
            check_column(columns[index], plan._column(index), f"slots[{index}]")
        return plan

    def _column(self, slot: int) -> str:
        return format_column(self.actions[:, slot].tolist(), self._readings[slot])

    def _content(self) -> dict[str, Any]:
        head: dict[str, Any] = {"pabc": "plan", "version": JSON_VERSION}
        head["timesteps"] = list(self.timesteps)
        if self.units != "step":
            head["units"] = self.units
        return {**head, "slots": [self._slot_content(j) for j in range(len(self.slots))]}

    def _slot_content(self, index: int) -> dict[str, Any]:
        slot = self.slots[index]
        content: dict[str, Any] = {"name": slot.name, "kind": slot.kind, "layer": slot.layer}
        content |= {"nbytes": slot.nbytes, "actions": self._column(index)}
        if slot.outer:
            content["outer"] = list(slot.outer)
        return content | write_readings(self.forecasts[index], self._readings[index])

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
        last row gives each step's phase.
        """
        columns = [self._column(slot) for slot in range(len(self.slots))]
        rows = group_columns([(slot.kind, slot.layer) for slot in self.slots], columns)
        rows.append(("phase", format_phases(self.phase_of_step)))
        width = max(len(label) for label, _ in rows)
        kinds = sorted({slot.kind for slot in self.slots}, key=KINDS.index)
        reused = ", ".join(f"{kind} {self.reuse_fraction(kind):.0%}" for kind in kinds)
        return "\n".join(
            [
                f"plan: {self.num_steps} steps, t = {self.timesteps[0]:g} to"
                f" {self.timesteps[-1]:g}, {len(self.slots)} slots; {format_legend(columns)}",
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


def _check_forecasts(
    forecasts: Sequence[Forecast] | None, slots: Sequence[SlotSpec], num_steps: int
) -> tuple[Forecast, ...]:
    given = (HOLD,) * len(slots) if forecasts is None else tuple(forecasts)
    if len(given) != len(slots):
        raise ValueError(f"forecasts: expected one per slot ({len(slots)}), found {len(given)}")
    checked: dict[int, Forecast] = {}  # slots of a kind share theirs
    for forecast, slot in zip(given, slots, strict=True):
        if id(forecast) not in checked:
            name = f"forecast of {slot.name!r}"
            checked[id(forecast)] = as_forecast(forecast, name, num_steps=num_steps)
    return tuple(checked[id(forecast)] for forecast in given)


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
