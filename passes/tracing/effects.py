"""effects: judges the side effects of a forward.

A graph computes results alone. To lose a table that a model builds at its first call is harmless.
To lose a counter, a residual that the next call reads, or an object that collects attention maps
would silently change what the model does. A trace shows the side effects; running the model tells
the harmful ones, and the modules that have them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pabc.internals.fakes import FakeTensor

from .calls import TracedCall
from .holders import MISSING, Change, Holder, HolderKind
from .python_state import Snapshot
from .trial_runs import TrialRuns, compared_name, copied, copies, devices_of, other_values

WrittenName = tuple[tuple[str, HolderKind], Hashable]
"""The path and kind of a holder, and a key in it, or None for all of it."""


@dataclass(frozen=True)
class Effects:
    """The side effects of a forward.

    Attributes:
        written: harmless writes: the values of these names are no part of the model's state.
        modules: modules with harmful side effects, each with why it must be opaque.
        deleted: keys that the forward deletes from its arguments, each as a path from
            `(args, kwargs)`.
    """

    written: tuple[WrittenName, ...] = ()
    modules: Mapping[str, str] = field(default_factory=dict)
    deleted: tuple[tuple[Any, ...], ...] = ()


def judge_effects(model: nn.Module, call: TracedCall, opaque: Mapping[str, str]) -> Effects:
    """Judges `call.left`, the changes that the last trace made.

    `opaque` are modules that the trace did not enter. The model runs three times and is then
    restored: twice with the arguments of the call, to see whether a second run gives the same, and
    once with others, to see which changes follow from them.

    Raises: ValueError, naming the change, where the model's own forward, not that of a module in
    it, keeps something from one call to the next, or writes to its arguments.
    """
    deleted = _check_arguments(model, call)
    left = [c for c in call.left if not _is_argument(c)]
    is_virtual = any(t.is_meta or isinstance(t, FakeTensor) for t in call.tensors)
    if is_virtual or not (left or call.iterators):
        return Effects(deleted=deleted)
    runs = TrialRuns(model, call, set(map(compared_name, left)))
    if not runs.repeat and not left:
        raise ValueError(
            f"{type(model).__name__}: expected the same result of the same call, found another, "
            f"which follows from {', '.join(call.iterators)}; pass such values as arguments"
        )
    harmful = runs.harmful()
    modules: dict[str, str] = {}
    for change in left:
        if compared_name(change) in harmful:
            writers = runs.writers.get(compared_name(change), set()) - opaque.keys()
            if not writers:
                raise ValueError(_describe(model, change))
            reason = f"it keeps {change.name} from one call to the next"
            modules.update((path, modules.get(path, reason)) for path in writers)
    return Effects(tuple(map(_name, left)), modules, deleted)


def find_written_tensors(
    model: nn.Module, call: TracedCall, opaque: Mapping[str, str]
) -> dict[str, str]:
    """Returns the modules, except the model itself, that write to tensors which modules hold, each
    with why it must be opaque: a trace stops at such a write."""
    snapshot = Snapshot.of(model, values="all")
    names = {holder.name_of(k) for holder in snapshot.holders for k in _tensors_in(holder)}
    try:
        runs = TrialRuns(model, call, names)
    except Exception:  # whatever stopped the trace may stop this as well
        return {}
    return {
        path: f"it writes to {name}"
        for name, paths in runs.writers.items()
        for path in paths - opaque.keys()
    }


def _tensors_in(holder: Holder) -> list[Any]:
    return [key for key, value in holder.read().items() if isinstance(value, torch.Tensor)]


def _describe(model: nn.Module, change: Change) -> str:
    return (
        f"{type(model).__name__}: expected a forward that keeps nothing from one call to the next, "
        f"found that it changes {change.name}, from {_short(change.old)} to {_short(change.new)}; "
        "keep such state outside of the model, or in a module of its own, which is then opaque"
    )


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"


def _name(change: Change) -> WrittenName:
    """Returns what was written: of a container, which may gain other entries later, all of it."""
    place = change.holder.path, change.holder.kind
    return place, None if change.holder.kind == "container" else change.key


# ---- arguments ----


def _is_argument(change: Change) -> bool:
    return change.holder.path.startswith("argument ")


def _check_arguments(model: nn.Module, call: TracedCall) -> tuple[tuple[Any, ...], ...]:
    """Returns the keys deleted from dictionaries; refuses all other writes to arguments."""
    deleted = []
    for change in filter(_is_argument, call.left):
        path = call.path_to(change.holder.value)
        if change.new is not MISSING or path is None or change.holder.kind != "container":
            raise ValueError(
                f"{change.name}: expected arguments that forward does not write to, found that "
                f"{type(model).__name__} changes it, from {_short(change.old)} to "
                f"{_short(change.new)}; return it as a result, or run this call on the model itself"
            )
        deleted.append((*path, change.key))
    return tuple(deleted)


def check_writes(call: TracedCall, positions: Sequence[int], names: Sequence[str]) -> None:
    """Raises ValueError unless every call writes the same values to its inputs, such as padding.

    They must not depend on the other inputs, and a second call must change nothing. `positions` are
    those of the inputs among the flattened arguments, `names` their names.
    """
    if any(t.is_meta or isinstance(t, FakeTensor) for t in call.tensors):
        return
    leaves = [copied(leaf) for leaf in call.leaves]
    others = [
        leaf if i in positions else other_values(leaf) for i, leaf in enumerate(copies(leaves))
    ]
    with torch.no_grad(), torch.random.fork_rng(devices_of(call.tensors)):
        call.run(leaves)
        once = copies([leaves[i] for i in positions])
        call.run(leaves)
        call.run(others)
    for name, i, value in zip(names, positions, once, strict=True):
        if not torch.equal(value, leaves[i]) or not torch.equal(value, others[i]):
            raise ValueError(
                "pabc expects a forward without side effects, found one that writes to "
                f"{[name]}, another value at each call; move the write out of forward"
            )
