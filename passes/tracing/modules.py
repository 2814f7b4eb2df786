"""modules: whether a model's Python state is as it was when a graph was captured.

A trace sees the modules, hooks, methods and Python values that there are at one time: a LoRA
adapter's scale, whether it is enabled, a processor, a forward that was replaced. Under another
state the model may compute something else: that is another program.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.guards import dict_version
from torch.utils.hooks import RemovableHandle

from .around import state_within
from .frozen import FrozenObject, Same, freeze, is_library
from .holders import Holder, Kind
from .walk import find_holders, hook_path

_BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"}
_CONTAINERS = (dict, list, set)
_WITHIN = ("", ".", ":", "[")
"""What follows the path of something in the paths of what is in it."""
Place = tuple[str, Kind]
Description = dict[Hashable, Hashable]
"""What a holder has, by name; equal to that of an equal state."""


class Watch:
    """The Python state of a model as it is now, described; what it costs is paid when it changes.

    :meth:`look` compares versions of dictionaries, in loops without Python code: that of each
    object's attributes, of each class, of globals that are read. For modules that PyTorch defines,
    whose attributes are numbers that are set once, it compares how many they are (a `forward` that
    was replaced is one more); where a generation starts, `closely`, their versions too.

    Attributes:
        state: what each place holds.
        serial: counts how often the state was seen to change.
    """

    def __init__(self, model: nn.Module) -> None:
        self.serial = 0
        self.state: dict[Place, Description] = {}
        self._model = model
        self._changed: list[frozenset[Place]] = []
        self._refresh()

    def look(self, *, closely: bool = False) -> int:
        """Returns the serial number of the state."""
        if not self._quick.hold() or (closely and not self._close.hold()):
            self._refresh()
        return self.serial

    def changed_since(self, serial: int) -> set[Place]:
        """Returns the places that have changed since the state had that serial number."""
        return set().union(*self._changed[serial:])

    def _refresh(self) -> None:
        holders = find_holders([("", "", self._model)])
        state = describe(holders)
        both = {**state, **self.state}
        changed = frozenset(p for p in both if state.get(p) != self.state.get(p))
        self._quick, self._close = _quick(holders), _close(holders)
        if changed:
            self.state = state
            self.serial += 1
            self._changed.append(changed)


class _Look:
    """What stays the same as long as nothing was written to, read in loops without Python code."""

    def __init__(
        self,
        versions: Iterable[dict[Any, Any]],
        lengths: Iterable[dict[Any, Any]],
        rest: Mapping[Kind, Sequence[Holder]],
    ) -> None:
        """`versions`, `lengths`: dictionaries of which the version, or the length, tells."""
        contained = [h.value for h in rest["container"] if _is_looked_at(h)]
        self._versioned = [
            *versions,
            *(_class_dict(h.value) for h in rest["class"]),
            *(value for value in contained if isinstance(value, dict)),
        ]
        self._counted = list(lengths)
        # A module's globals come and go: those that are read are looked up.
        pairs = [(h.value, name) for h in rest["globals"] for name in h.names or ()]
        self._spaces, self._names = [space for space, _ in pairs], [name for _, name in pairs]
        self._others = [value for value in contained if not isinstance(value, dict)]
        self._children = tuple(h.value for h in rest["children"] if h.value)
        self._slow = [h for kind in ("variable", "slots", "array") for h in rest[kind]]
        self._found = self._read()

    def hold(self) -> bool:
        """Whether all of it gives what it gave."""
        try:
            return self._read() == self._found
        except Exception:  # whatever the comparison of unlike tensors says
            return False

    def _read(self) -> tuple[object, ...]:
        return (
            list(map(dict_version, self._versioned)),
            list(map(len, self._counted)),
            gc.get_referents(*self._children),
            RemovableHandle.next_id,
            list(map(id, map(dict.get, self._spaces, self._names))),
            list(map(list, self._others)) if self._others else None,
            [_describe_object(h, {}) for h in self._slow] if self._slow else None,
        )


def _quick(holders: Collection[Holder]) -> _Look:
    """What is looked at in each call."""
    kinds = _by_kind(holders)
    own = [h.value for h in kinds["module"] if not _is_of_library(h)]
    hooked = [h.value for h in kinds["hooks"] if h.value]  # a new hook has a new number
    versions = (*own, *(h.value for h in kinds["object"]), *hooked)
    return _Look(versions, (h.value for h in kinds["module"] if _is_of_library(h)), kinds)


def _close(holders: Collection[Holder]) -> _Look:
    """What is looked at where a generation starts."""
    kinds = _by_kind(holders)
    return _Look((h.value for name in _OF_MODULES for h in kinds[name]), (), kinds)


_OF_MODULES: tuple[Kind, ...] = ("module", "children", "tensors", "hooks", "object")


def _is_looked_at(holder: Holder) -> bool:
    """Whether a container is more than a module's own bookkeeping."""
    return holder.path.rpartition(".")[2] not in _BOOKKEEPING


def _class_dict(cls: type) -> dict[str, Any]:
    """Returns the dictionary that a class's attributes are in, to read its version."""
    return next(d for d in gc.get_referents(cls.__dict__) if type(d) is dict)


def _by_kind(holders: Iterable[Holder]) -> dict[Kind, list[Holder]]:
    kinds: dict[Kind, list[Holder]] = {kind: [] for kind in _ORDER}
    for holder in holders:
        kinds[holder.kind].append(holder)
    return kinds


def _is_of_library(holder: Holder) -> bool:
    return holder.owner is not None and is_library(holder.owner.__module__)


def describe(holders: Iterable[Holder]) -> dict[Place, Description]:
    """Returns what the holders have, in a form that can be compared with a later state."""
    state: dict[Place, Description] = {}
    known = list(holders)
    paths = {id(h.value): h.path for h in known if h.kind == "container"}
    for holder in known:
        description = _DESCRIBE[holder.kind](holder, paths)
        if description is not None:
            state[holder.path, holder.kind] = (
                state.get((holder.path, holder.kind), {}) | description
            )
    return state


Paths = Mapping[int, str]
"""The path under which each container is described, by its identity."""


def _describe_module(holder: Holder, paths: Paths) -> Description:
    state = holder.value if holder.path else state_within(holder.value, holder.owner)
    own = {name: _value(x, paths) for name, x in state.items() if name not in _BOOKKEEPING}
    return {"the class": Same(holder.owner), **own}


def _describe_object(holder: Holder, paths: Paths) -> Description:
    """Which tensor a module has is looked at where a graph reads it; of an object, here."""
    return {
        name: Same(x) if isinstance(x, torch.Tensor) else _value(x, paths)
        for name, x in holder.read().items()
    }


def _describe_children(holder: Holder, paths: Paths) -> Description:
    return {"what is a module": tuple((name, Same(m)) for name, m in holder.value.items())}


def _describe_tensors(holder: Holder, paths: Paths) -> Description:
    return {name: True for name, x in holder.value.items() if x is not None}


def _describe_hooks(holder: Holder, paths: Paths) -> Description | None:
    """Of each hook, how a user finds it, what it is, and which object."""
    path = holder.path.rpartition("_forward")[0].rstrip(".")
    hooks = holder.value.values()
    frozen = tuple((hook_path(path, hook), freeze(hook), Same(hook)) for hook in hooks)
    return {"hooks": frozen} if frozen else None


def _describe_container(holder: Holder, paths: Paths) -> Description | None:
    return _describe_object(holder, paths) if _is_looked_at(holder) else None


def _describe_globals(holder: Holder, paths: Paths) -> Description:
    return {name: _value(x, paths) for name, x in holder.read().items()}


def _value(value: Any, paths: Paths) -> Hashable:
    """A value in short: a container is told by where it is described."""
    if isinstance(value, torch.Tensor):
        return "a tensor"
    if type(value) in _CONTAINERS:
        return f"a {type(value).__name__}", paths.get(id(value))
    return freeze(value)


_DESCRIBE: dict[Kind, Callable[[Holder, Paths], Description | None]] = {
    "module": _describe_module,
    "object": _describe_object,
    "children": _describe_children,
    "tensors": _describe_tensors,
    "hooks": _describe_hooks,
    "container": _describe_container,
    "slots": _describe_object,
    "array": _describe_object,
    "variable": _describe_object,
    "class": _describe_globals,
    "globals": _describe_globals,
}


_REACHED: tuple[Kind, ...] = (
    "object",
    "slots",
    "array",
    "container",
    "variable",
    "class",
    "globals",
)
"""Kinds of places that are new only where something that leads to them is: that tells more."""
_ORDER: tuple[Kind, ...] = (
    *_OF_MODULES,
    *_REACHED[1:],
)
"""Kinds of places, those first that tell a user most."""


class Modules:
    """The Python state of a model that a graph was captured for.

    Not part of it: what is within modules, and hooks, that the graph calls as they are
    (`outside`, their paths), and names that a forward only writes (`written`): tables that are
    built at the first call.
    """

    def __init__(
        self,
        model: nn.Module,
        outside: Collection[str] = (),
        written: Collection[tuple[Place, Hashable]] = (),
    ) -> None:
        self._written = frozenset(written)
        within = (path if key is None else f"{path}.{key}" for (path, _), key in written)
        self._outside = frozenset((*outside, *within))
        holders = find_holders([("", "", model)])
        self._expected = {p: d for p, d in describe(holders).items() if not self._is_excluded(p)}
        self._differing: dict[Place, str] = {}
        self._seen: tuple[Watch, int] | None = None

    def hold(self, watch: Watch) -> bool:
        """Whether the state, as last looked at, is the one that was captured."""
        return self.difference(watch) is None

    def difference(self, watch: Watch) -> str | None:
        """Returns what is not as it was, in words; None: nothing."""
        if self._seen is None or self._seen[0] is not watch:
            self._compare(watch, {**watch.state, **self._expected})
        elif self._seen[1] != watch.serial:
            self._compare(watch, watch.changed_since(self._seen[1]))
        self._seen = watch, watch.serial
        first = min(self._differing, key=lambda place: _ORDER.index(place[1]), default=None)
        return None if first is None else self._differing[first]

    def _compare(self, watch: Watch, places: Iterable[Place]) -> None:
        for place in places:
            self._differing.pop(place, None)
            if self._is_excluded(place):
                continue
            reason = self._differ(place, self._expected.get(place), watch.state.get(place))
            if reason is not None:
                self._differing[place] = reason

    def _differ(self, place: Place, old: Description | None, new: Description | None) -> str | None:
        where = place[0] or "the model"
        if old == new or (place[1] == "hooks" and self._are_alike(old, new)):
            return None
        if old is None and place[1] in _REACHED:
            return None
        if old is None or new is None:
            return f"{where} is {'new' if old is None else 'gone'}"
        for name in {**old, **new}:
            if old.get(name) == new.get(name) or (place, name) in self._written:
                continue
            if name not in old and place[1] == "module" and _is_unread(name, new):
                continue
            return f"{name} of {where} changed"
        return None

    def _are_alike(self, old: Description | None, new: Description | None) -> bool:
        """Whether hooks do the same; those that the graph calls must be the same objects."""
        before: Any = (old or {}).get("hooks", ())
        after: Any = (new or {}).get("hooks", ())
        return len(before) == len(after) and all(
            a[2] == b[2] if a[0] in self._outside else a[1] == b[1]
            for a, b in zip(before, after, strict=True)
        )

    def _is_excluded(self, place: Place) -> bool:
        path = place[0]
        return any(path.startswith(n) and path[len(n) :][:1] in _WITHIN for n in self._outside)


def _is_unread(name: Hashable, state: Description) -> bool:
    """Whether an attribute that is new is an object that a trace without it cannot have met: it
    hides nothing of the class. Libraries note things of their own on modules in this way."""
    owner = state["the class"]
    assert isinstance(owner, Same)
    is_object = isinstance(state[name], (Same, FrozenObject))
    return is_object and not hasattr(owner.value, str(name))
