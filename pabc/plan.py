"""What to do at each diffusion step with each slot, how long values live, and which phases result.

A plan is pure data: it is worked out once, before anything runs, from which steps reuse which slot.
Everything else follows from that one boolean table (`Plan.from_reuse`), so two plans with the same
timesteps, slots and table are the same plan.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

KINDS = ("spatial", "temporal", "full", "joint", "cross", "mlp", "other")
"""Region kinds: the attention kinds, then `mlp`, then `other` (not on the latent stream)."""

JSON_VERSION = 1


class Action(enum.IntEnum):
    """What one step does with one slot; the numbers are those of `Plan.actions`."""

    COMPUTE = 0
    """Compute the region; nothing later reads the value."""
    STORE = 1
    """Compute the region and keep the value for a later step."""
    REUSE = 2
    """Read the kept value; the region does not run."""


_SYMBOLS = {Action.COMPUTE: "#", Action.STORE: "+", Action.REUSE: "."}


@dataclass(frozen=True, slots=True)
class SlotSpec:
    """One place where a cut is kept between steps.

    `layer` is the ordinal, in execution order, of the slot's region among the regions of its kind.
    `nbytes` is the size of one stored value. Raises `ValueError` on an unknown kind or a negative number.
    """

    name: str
    kind: str
    layer: int
    nbytes: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"kind of slot {self.name!r}: got {self.kind!r}, allowed: {', '.join(KINDS)}"
            )
        for field in ("layer", "nbytes"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(
                    f"{field} of slot {self.name!r}: got {value!r}, allowed: an integer of 0 or more"
                )


@dataclass(frozen=True, slots=True)
class Phase:
    """Steps that reuse the same slots, and so run the same specialized module.

    `reused` and `stored` are ascending slot indices. There is one phase per distinct *reused* set, not
    per distinct action vector: `stored` joins what any of its steps stores, and at a step whose action
    is `COMPUTE` the runtime drops the value. That gives fewer modules (a 2/4/6 pyramid has five) and
    costs nothing, since the tensor at a cut is materialized anyway.
    """

    index: int
    reused: tuple[int, ...]
    stored: tuple[int, ...]
    steps: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """A schedule bound to slots: one action per step and slot. Build it with `Plan.from_reuse`.

    Reuse never reads a slot that was not stored. A value is stored only if a later step reads it, and
    is freed after its last read.

    Attributes:
        timesteps: one per step, as they are run.
        slots: the columns of `actions` and `sources`.
        actions: int8 [num_steps, num_slots], values of `Action`; read-only.
        sources: int32 [num_steps, num_slots], the step whose value a reuse reads, else -1; read-only.
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
        """The plan in which step i reuses slot j where `reuse[i, j]`, and computes it elsewhere.

        `reuse` is boolean [num_steps, num_slots]. Raises `ValueError` on a wrong shape, two slots of
        one name, or reuse at step 0.
        """
        slots, table = tuple(slots), np.asarray(reuse)
        _check_slots(slots)
        if (
            table.dtype != np.bool_
            or table.shape != (len(timesteps), len(slots))
            or not len(timesteps)
        ):
            raise ValueError(
                f"reuse: got {table.dtype} {list(table.shape)}, allowed: bool [num_steps >= 1, num_slots]"
                f" = [{len(timesteps)}, {len(slots)}]"
            )
        if table[0].any():
            name = slots[int(np.argmax(table[0]))].name
            raise ValueError(f"reuse: slot {name!r} is reused at step 0, allowed: from step 1 on")
        sources = _find_sources(table)
        actions = np.where(table, Action.REUSE, Action.COMPUTE).astype(np.int8)
        for step, slot in zip(*np.nonzero(table), strict=True):
            actions[sources[step, slot], slot] = Action.STORE
        phases, phase_of_step = _find_phases(actions)
        for array in (actions, sources, phase_of_step):
            array.setflags(write=False)
        return cls(
            timesteps=tuple(float(t) for t in timesteps),
            slots=slots,
            actions=actions,
            sources=sources,
            frees=_find_frees(sources),
            phases=phases,
            phase_of_step=phase_of_step,
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
    def bytes_at(self) -> npt.NDArray[np.int64]:
        """Bytes of stored values at the fullest moment of each step, int64 [num_steps].

        Counts the values that the step reads or stores, and those kept across it for a later step.
        A slot counts once: a value that a store replaces is dead by then. Values that a phase
        materializes and drops at once are activations, and not counted.
        """
        live = np.zeros(self.actions.shape, dtype=bool)
        for step, slot in zip(*np.nonzero(self.reuse), strict=True):
            live[self.sources[step, slot] : step + 1, slot] = True
        sizes = np.array([slot.nbytes for slot in self.slots], dtype=np.int64)
        return (live * sizes[None, :]).sum(axis=1, dtype=np.int64)

    @property
    def peak_bytes(self) -> int:
        """Bytes of stored values at the fullest moment of the generation."""
        return int(self.bytes_at.max())

    def reuse_fraction(self, kind: str | None = None) -> float:
        """Share of (step, slot) pairs of a kind, or of all, that reuse; 0.0 if there is no such slot."""
        if kind is not None and kind not in KINDS:
            raise ValueError(f"kind: got {kind!r}, allowed: {', '.join(KINDS)}")
        columns = [j for j, slot in enumerate(self.slots) if kind in (None, slot.kind)]
        return float(self.reuse[:, columns].mean()) if columns else 0.0

    def digest(self) -> str:
        """SHA-256, as hex, of timesteps, slots and actions.

        Ranks compare it to make sure that they follow one plan. Bytes per slot are left out: ranks may
        hold shards of unequal size.
        """
        content = self._content()
        for slot in content["slots"]:
            del slot["nbytes"]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        """The plan as JSON; `Plan.from_json` gives an equal plan back."""
        return json.dumps(self._content(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote. Raises `ValueError` on anything else."""
        content = load_document(text, "plan", ("timesteps", "slots"))
        slots, columns = [], []
        for index, entry in enumerate(content["slots"]):
            check_fields(entry, f"slots[{index}]", ("name", "kind", "layer", "nbytes", "actions"))
            column = entry.pop("actions")
            if not isinstance(column, str) or set(column) - set(_SYMBOLS.values()):
                raise ValueError(
                    f"slots[{index}].actions: got {column!r}, allowed: a string of '#', '+', '.'"
                )
            if len(column) != len(content["timesteps"]):
                raise ValueError(
                    f"slots[{index}].actions: got {len(column)} steps, allowed: one per timestep"
                    f" ({len(content['timesteps'])})"
                )
            slots.append(SlotSpec(**entry))
            columns.append([symbol == "." for symbol in column])
        reuse = np.array(columns, dtype=bool).reshape(len(slots), len(content["timesteps"])).T
        plan = cls.from_reuse(content["timesteps"], slots, reuse)
        for index, entry in enumerate(plan._content()["slots"]):
            stated = json.loads(text)["slots"][index]["actions"]
            if entry["actions"] != stated:
                raise ValueError(
                    f"slots[{index}].actions: got {stated!r}, allowed: stores exactly where a later"
                    f" step reads, {entry['actions']!r}"
                )
        return plan

    def _content(self) -> dict:
        columns = [_symbols(self.actions[:, j]) for j in range(len(self.slots))]
        slots = [
            {
                "name": s.name,
                "kind": s.kind,
                "layer": s.layer,
                "nbytes": s.nbytes,
                "actions": column,
            }
            for s, column in zip(self.slots, columns, strict=True)
        ]
        return {
            "pabc": "plan",
            "version": JSON_VERSION,
            "timesteps": list(self.timesteps),
            "slots": slots,
        }

    def _key(self) -> tuple:
        return self.timesteps, self.slots, self.actions.tobytes()

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Plan) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __reduce__(self) -> tuple:
        return Plan.from_reuse, (self.timesteps, self.slots, self.reuse)

    def __str__(self) -> str:
        return format_plan(self)


def format_plan(plan: Plan) -> str:
    """A table: a row per kind (or per group of its slots that act alike), a character per step.

    `#` compute, `+` compute and store, `.` reuse; the last row gives each step's phase.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for slot_index, slot in enumerate(plan.slots):
        column = _symbols(plan.actions[:, slot_index])
        groups.setdefault((slot.kind, column), []).append(slot.layer)
    split = {kind for kind, _ in groups if sum(kind == other for other, _ in groups) > 1}
    rows = [
        (f"{kind} {_ranges(layers)}" if kind in split else kind, column)
        for (kind, column), layers in groups.items()
    ]
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    rows.append(
        ("phase", "".join(digits[p] if p < len(digits) else "*" for p in plan.phase_of_step))
    )
    width = max(len(label) for label, _ in rows)
    kinds = sorted({slot.kind for slot in plan.slots}, key=KINDS.index)
    reused = ", ".join(f"{kind} {plan.reuse_fraction(kind):.0%}" for kind in kinds) or "nothing"
    first, last = plan.timesteps[0], plan.timesteps[-1]
    return "\n".join(
        [
            f"plan: {plan.num_steps} steps (t = {first:g} to {last:g}), {len(plan.slots)} slots;"
            " # compute, + compute and store, . reuse",
            *(f"  {label:<{width}}  {column}" for label, column in rows),
            f"  {len(plan.phases)} phases; reused: {reused}; peak {_format_bytes(plan.peak_bytes)}",
        ]
    )


def load_document(text: str, name: str, fields: Sequence[str]) -> dict:
    """Parse a JSON object that pabc wrote, and check its name, version and fields."""
    try:
        content = json.loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} JSON: not valid JSON ({error})") from error
    check_fields(content, f"{name} JSON", ("pabc", "version", *fields))
    if content["pabc"] != name:
        raise ValueError(f"{name} JSON, pabc: got {content['pabc']!r}, allowed: {name!r}")
    if content["version"] != JSON_VERSION:
        raise ValueError(
            f"{name} JSON, version: got {content['version']!r}, allowed: {JSON_VERSION}"
        )
    for field in fields:
        expected = {"masks": dict, "label": str}.get(field, list)
        if not isinstance(content[field], expected):
            raise ValueError(
                f"{name} JSON, {field}: got {type(content[field]).__name__}, allowed: {expected.__name__}"
            )
    return content


def check_fields(content: object, where: str, fields: Sequence[str]) -> None:
    """Raise `ValueError` unless `content` is a JSON object with exactly these fields."""
    if not isinstance(content, dict):
        raise ValueError(f"{where}: got {type(content).__name__}, allowed: an object")
    for field in content:
        if field not in fields:
            raise ValueError(f"{where}: unknown field {field!r}, allowed: {', '.join(fields)}")
    for field in fields:
        if field not in content:
            raise ValueError(f"{where}: field {field!r} is missing, needed: {', '.join(fields)}")


def _check_slots(slots: tuple[SlotSpec, ...]) -> None:
    seen: set[str] = set()
    for slot in slots:
        if slot.name in seen:
            raise ValueError(f"slots: name {slot.name!r} occurs twice, allowed: one slot per name")
        seen.add(slot.name)


def _find_sources(reuse: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    steps = np.arange(len(reuse), dtype=np.int32)[:, None]
    last_computed = np.maximum.accumulate(np.where(reuse, -1, steps), axis=0)
    return np.where(reuse, last_computed, -1).astype(np.int32)


def _find_frees(sources: npt.NDArray[np.int32]) -> tuple[tuple[int, ...], ...]:
    next_sources = np.concatenate([sources[1:], np.full_like(sources[:1], -1)])
    # A value's reads are consecutive: the next step either reads it too, or no step ever does again.
    last_reads = (sources >= 0) & (next_sources != sources)
    return tuple(tuple(np.nonzero(row)[0].tolist()) for row in last_reads)


def _find_phases(actions: npt.NDArray[np.int8]) -> tuple[tuple[Phase, ...], npt.NDArray[np.int32]]:
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


def _symbols(column: npt.NDArray[np.int8]) -> str:
    return "".join(_SYMBOLS[Action(action)] for action in column)


def _ranges(numbers: Sequence[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2,5`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in runs)


def _format_bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
