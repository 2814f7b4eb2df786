"""Plans: the action of each diffusion step on each slot, lifetimes of values, and phases.

A plan is pure data, made before anything runs. All of it follows from one boolean table, which
steps reuse which slots (`Plan.from_reuse`): plans with the same timesteps, slots and table are
equal.
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
from pabc.base.kinds import KINDS, check_kind
from pabc.validate import JSON_VERSION, as_timesteps, check_fields, parse_document


class Action(enum.IntEnum):
    """The action of one step on one slot; the numbers are those of `Plan.actions`."""

    COMPUTE = 0
    """Compute the region; no later step reads the value."""
    STORE = 1
    """Compute the region and keep the value for a later step."""
    REUSE = 2
    """Read the kept value; the region does not run."""


_SYMBOLS = {Action.COMPUTE: "#", Action.STORE: "+", Action.REUSE: "."}


@dataclass(frozen=True, slots=True)
class SlotSpec:
    """One place where a cut is kept between steps.

    `layer` is the ordinal, in execution order, of the slot's region among the regions of its kind;
    the slots of one region share it. `nbytes` is the size of one stored value. Raises `ValueError`
    on an unknown kind, or a number that is no integer of 0 or more.
    """

    name: str
    kind: str
    layer: int
    nbytes: int = 0

    def __post_init__(self) -> None:
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
    and is freed after its last read.

    Attributes:
        timesteps: one per step, as they are run.
        slots: the columns of `actions` and `sources`.
        actions: int8 [num_steps, num_slots], values of `Action`; read-only.
        sources: int32 [num_steps, num_slots], the step whose value a reuse reads, else -1;
            read-only.
        frees: per step, the slots whose value is dead after that step.
        phases: in order of their first step.
        phase_of_step: int32 [num_steps], index into `phases`; read-only.
    """

    timesteps: tuple[float, ...]
    slots: tuple[SlotSpec, ...]
    actions: npt.NDArray[np.int8]
    sources: npt.NDArray[np.int32]
    frees: tuple[tuple[int, ...], ...]
    phases: tuple[Phase, ...]
    phase_of_step: npt.NDArray[np.int32]

    @classmethod
    def from_reuse(
        cls, timesteps: Sequence[float], slots: Sequence[SlotSpec], reuse: npt.ArrayLike
    ) -> Plan:
        """Returns the plan in which step i reuses slot j where `reuse[i, j]`, else computes it.

        `reuse` is boolean [num_steps, num_slots]. Raises `ValueError` on a wrong shape, two slots
        of one name, or reuse at step 0.
        """
        timesteps, slots, table = as_timesteps(timesteps), tuple(slots), np.asarray(reuse)
        _check_table(timesteps, slots, table)
        sources = _find_sources(table)
        actions = np.where(table, Action.REUSE, Action.COMPUTE).astype(np.int8)
        actions[sources[table], np.nonzero(table)[1]] = Action.STORE
        phases, phase_of_step = _find_phases(actions)
        for array in (actions, sources, phase_of_step):
            array.setflags(write=False)
        frees = _find_frees(actions)
        return cls(timesteps, slots, actions, sources, frees, phases, phase_of_step)

    @property
    def num_steps(self) -> int:
        """Number of diffusion steps."""
        return len(self.timesteps)

    @property
    def reuse(self) -> npt.NDArray[np.bool_]:
        """Boolean [num_steps, num_slots]: where the action is `REUSE`."""
        return self.actions == Action.REUSE

    @cached_property
    def until(self) -> npt.NDArray[np.int32]:
        """The last step that may read a value computed at each step: int32 [num_steps, num_slots].

        It is the end of the run of reusing steps that follows; -1 if the next step computes. It is
        defined for reusing steps, too, which compute the value if none was stored.
        """
        until = np.full((self.num_steps + 1, len(self.slots)), -1, dtype=np.int32)
        for step in range(self.num_steps - 2, -1, -1):
            last = np.maximum(until[step + 1], step + 1)
            until[step] = np.where(self.reuse[step + 1], last, -1)
        until.setflags(write=False)
        return until[: self.num_steps]

    @property
    def bytes_at(self) -> npt.NDArray[np.int64]:
        """Bytes of stored values at the fullest moment of each step, int64 [num_steps].

        Counts the values that the step reads or stores. No others are alive, since the reads of a
        value follow its store without a gap. Values that a phase computes but does not store are
        activations, which are not counted.
        """
        sizes = np.array([slot.nbytes for slot in self.slots], dtype=np.int64)
        return np.where(self.actions == Action.COMPUTE, 0, sizes).sum(axis=1, dtype=np.int64)

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
        content = parse_document(text, "plan", {"timesteps": list, "slots": list})
        timesteps, slots, columns = as_timesteps(content["timesteps"]), [], []
        for index, entry in enumerate(content["slots"]):
            check_fields(entry, f"slots[{index}]", ("name", "kind", "layer", "nbytes", "actions"))
            columns.append(_check_column(entry.pop("actions"), index, len(timesteps)))
            slots.append(SlotSpec(**entry))
        reuse = np.array([[symbol == "." for symbol in column] for column in columns], dtype=bool)
        plan = cls.from_reuse(timesteps, slots, reuse.reshape(len(slots), len(timesteps)).T)
        for index, column in enumerate(columns):
            if plan._column(index) != column:
                raise ValueError(
                    f"slots[{index}].actions: expected '+' exactly where a later step reads the"
                    f" value, {plan._column(index)!r}, found {column!r}"
                )
        return plan

    def _column(self, slot: int) -> str:
        return "".join(_SYMBOLS[Action(action)] for action in self.actions[:, slot])

    def _content(self) -> dict[str, Any]:
        slots = [
            {"name": slot.name, "kind": slot.kind, "layer": slot.layer, "nbytes": slot.nbytes}
            | {"actions": self._column(index)}
            for index, slot in enumerate(self.slots)
        ]
        head = {"pabc": "plan", "version": JSON_VERSION}
        return {**head, "timesteps": list(self.timesteps), "slots": slots}

    def _key(self) -> tuple[object, ...]:
        return self.timesteps, self.slots, self.actions.tobytes()

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Plan) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __reduce__(self) -> tuple[object, ...]:
        return Plan.from_reuse, (self.timesteps, self.slots, self.reuse)

    def __str__(self) -> str:
        """Returns a table: a row per kind (or group of slots that act alike), a column per step.

        `#` compute, `+` compute and store, `.` reuse; the last row gives each step's phase.
        """
        rows = [*_table_rows(self), ("phase", "".join(map(_digit, self.phase_of_step)))]
        width = max(len(label) for label, _ in rows)
        kinds = sorted({slot.kind for slot in self.slots}, key=KINDS.index)
        reused = ", ".join(f"{kind} {self.reuse_fraction(kind):.0%}" for kind in kinds)
        return "\n".join(
            [
                f"plan: {self.num_steps} steps, t = {self.timesteps[0]:g} to"
                f" {self.timesteps[-1]:g}, {len(self.slots)} slots;"
                " # compute, + compute and store, . reuse",
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
    if not isinstance(column, str) or set(column) - set(_SYMBOLS.values()):
        raise ValueError(
            f"slots[{index}].actions: expected a string of '#', '+' and '.', found {column!r}"
        )
    if len(column) != num_steps:
        raise ValueError(
            f"slots[{index}].actions: expected one per step ({num_steps}), found {len(column)}"
        )
    return column


def _find_sources(reuse: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    steps = np.arange(len(reuse), dtype=np.int32)[:, None]
    last_computed = np.maximum.accumulate(np.where(reuse, -1, steps), axis=0)
    return np.where(reuse, last_computed, -1).astype(np.int32)


def _find_frees(actions: npt.NDArray[np.int8]) -> tuple[tuple[int, ...], ...]:
    # The reads of a value follow its store without a gap, so the last one is where they stop.
    following = np.concatenate([actions[1:], np.zeros_like(actions[:1])])
    last_reads = (actions == Action.REUSE) & (following != Action.REUSE)
    return tuple(tuple(np.nonzero(row)[0].tolist()) for row in last_reads)


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


def _table_rows(plan: Plan) -> list[tuple[str, str]]:
    groups: dict[tuple[str, str], set[int]] = {}
    for index, slot in enumerate(plan.slots):
        groups.setdefault((slot.kind, plan._column(index)), set()).add(slot.layer)
    kinds = [kind for kind, _ in groups]
    return [
        (kind if kinds.count(kind) == 1 else f"{kind} {format_numbers(layers)}", column)
        for (kind, column), layers in groups.items()
    ]


def _digit(phase: int) -> str:
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    return digits[phase] if phase < len(digits) else "*"
