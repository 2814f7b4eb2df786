"""Compares a model's Python state with the one that a graph is specialized on, at each call."""

from __future__ import annotations

import functools
import gc
import operator
import sys
from collections import deque
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from itertools import chain
from types import FunctionType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from pabc.internals.dynamo import dict_version
from pabc.passes import (
    PLAIN_VALUES,
    Description,
    FrozenObject,
    Holder,
    HolderKey,
    HolderKind,
    ModelState,
    Same,
    StateWalk,
    container_class,
    describe,
    freeze,
    is_library,
    is_state,
    walk_from,
)

_OF_MODULES: tuple[HolderKind, ...] = ("module", "children", "tensors", "hooks", "object")
_REACHED: tuple[HolderKind, ...] = (
    "object",
    "slots",
    "array",
    "container",
    "variable",
    "class",
    "globals",
)
"""Kinds of holders that are new only where something that leads to them is, which tells more."""
_SLOW: tuple[HolderKind, ...] = ("slots", "array")
"""Kinds of holders that are read one by one at each call."""
_BARE: tuple[Any, ...] = (list, set, deque)
"""Containers without keys."""
_HAS_VERSIONS = sys.version_info < (3, 13)
"""True where a write to an attribute changes the version of the dictionary that has it."""
_contents = operator.attrgetter("cell_contents")
_code = operator.attrgetter("__code__", "__defaults__", "__kwdefaults__")
_ORDER: tuple[HolderKind, ...] = (*_OF_MODULES, *_REACHED[1:])
"""Kinds of holders, those first that tell a user most."""


class Watch:
    """The Python state of a model as it is now; it is described again only when it changes.

    :meth:`look` compares versions of dictionaries (from Python 3.13 on, what they hold), in loops
    without Python code: those of objects' attributes, of classes, and of globals that are read. The
    attributes of modules that PyTorch defines are numbers that are set once: where a module has
    none but those, it compares their count, which a replaced `forward` changes, and the attributes
    only if asked to look `closely`, at the start of a generation. Then it compares the code of
    functions, too, which an editor may replace.

    Attributes:
        state: the description of each place.
        names: what methods of modules name, and functions that they hold.
        serial: the number of changes seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self.serial = 0
        self.state: dict[HolderKey, Description] = {}
        self.names: frozenset[str] = frozenset()
        self._model = model
        self._changed: list[frozenset[HolderKey]] = []
        self._refresh()

    def look(self, *, closely: bool = False) -> int:
        """Returns the serial number of the state, which a change increments."""
        if not self._quick.hold() or (closely and not self._close.hold()):
            self._refresh()
        return self.serial

    def changed_since(self, serial: int) -> set[HolderKey]:
        """Returns the places that have changed since the state had that serial number."""
        return set().union(*self._changed[serial:])

    def _refresh(self) -> None:
        walk = walk_from([("", "", self._model)])
        state = describe(walk.holders)
        both = {**state, **self.state}
        changed = frozenset(p for p in both if state.get(p) != self.state.get(p))
        self._quick, self._close, self.names = _quick(walk), _close(walk), walk.names
        if changed:
            self.state = state
            self.serial += 1
            self._changed.append(changed)


class _Look:
    """Values that stay the same until something is written, read in loops without Python code."""

    def __init__(
        self,
        versions: Iterable[dict[Any, Any]],
        lengths: Iterable[dict[Any, Any]],
        rest: Mapping[HolderKind, Sequence[Holder]],
        functions: Sequence[FunctionType] = (),
    ) -> None:
        """Takes dictionaries to compare by version, or by length, the other holders, and functions
        whose code is compared."""
        contained = [h.value for h in rest["container"] if is_state(h)]
        self._versioned = [
            *versions,
            *(_class_dict(h.value) for h in rest["class"]),
            *(value for value in contained if issubclass(type(value), dict)),
        ]
        self._counted = list(lengths)
        # A module's globals come and go: those that are read are looked up.
        pairs = [(h.value, name) for h in rest["globals"] for name in h.names or ()]
        self._spaces, self._names = [space for space, _ in pairs], [name for _, name in pairs]
        self._functions = functions
        self._containers = [
            base.__iter__.__get__(v)  # as Python stores it: a subclass may iterate in another way
            for v in contained
            if (base := container_class(v)) in _BARE
        ]
        self._children = tuple(h.value for h in rest["children"] if h.value)
        variables = rest["variable"]
        self._cells = [h.value for h in variables if h.read()]
        empty = [h for h in variables if not h.read()]
        self._slow = [*empty, *(h for kind in _SLOW for h in rest[kind])]
        self._kept = [  # so that no other object takes the address of one whose id is compared
            *map(_contents, self._cells),
            *map(dict.get, self._spaces, self._names),
            *chain.from_iterable(each() for each in self._containers),
            *(_values(self._versioned) if not _HAS_VERSIONS else ()),
            *chain.from_iterable(map(_code, functions)),
        ]
        self._found = self._read()

    def hold(self) -> bool:
        """Returns True if nothing has changed."""
        try:
            return self._read() == self._found
        except Exception:  # whatever the comparison of unlike tensors says
            return False

    def _read(self) -> tuple[object, ...]:
        return (
            _read_versions(self._versioned),
            list(map(len, self._counted)),
            gc.get_referents(*self._children),
            RemovableHandle.next_id,
            list(map(id, map(dict.get, self._spaces, self._names))),
            [list(map(id, each())) for each in self._containers],
            list(map(id, map(_contents, self._cells))),
            list(map(_read_slowly, self._slow)),
            list(map(id, chain.from_iterable(map(_code, self._functions)))),
        )


def _read_slowly(holder: Holder) -> dict[Any, Hashable]:
    """Returns what a holder holds: plain values with their types, and other objects by identity."""
    contents = holder.read()
    return {k: freeze(x) if isinstance(x, PLAIN_VALUES) else Same(x) for k, x in contents.items()}


def _read_versions(dictionaries: Sequence[dict[Any, Any]]) -> tuple[object, ...]:
    """Returns what a write to one of the dictionaries changes: their versions, or, from Python 3.13
    on, their keys and the identities of their values."""
    if _HAS_VERSIONS:
        return (*map(dict_version, dictionaries),)
    names = list(chain.from_iterable(map(dict.__iter__, dictionaries)))
    return list(map(len, dictionaries)), names, list(map(id, _values(dictionaries)))


def _values(dictionaries: Iterable[dict[Any, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, dictionaries)))


def _quick(walk: StateWalk) -> _Look:
    """Returns what is compared in each call."""
    kinds = _by_kind(walk.holders)
    own = [h.value for h in kinds["module"] if not _is_plain(h)]
    hooked = [h.value for h in kinds["hooks"] if h.value]  # a new hook has a new number
    versions = (*own, *(h.value for h in kinds["object"]), *hooked)
    return _Look(versions, (h.value for h in kinds["module"] if _is_plain(h)), kinds)


def _close(walk: StateWalk) -> _Look:
    """Returns what is compared, too, where a generation starts."""
    kinds = _by_kind(walk.holders)
    modules = (h.value for name in _OF_MODULES for h in kinds[name])
    return _Look(modules, (), kinds, walk.functions)


def _class_dict(cls: type) -> dict[str, Any]:
    """Returns the dictionary that a class's attributes are in, to read its version."""
    return next(d for d in gc.get_referents(cls.__dict__) if type(d) is dict)


def _by_kind(holders: Iterable[Holder]) -> dict[HolderKind, list[Holder]]:
    kinds: dict[HolderKind, list[Holder]] = {kind: [] for kind in _ORDER}
    for holder in holders:
        kinds[holder.kind].append(holder)
    return kinds


def _is_plain(holder: Holder) -> bool:
    """Returns True for a module of a class of PyTorch's with the attributes that this gives it."""
    cls: Any = holder.owner
    return is_library(cls.__module__) and holder.value.keys() <= _attributes_of(cls)


@functools.cache
def _attributes_of(cls: Hashable) -> frozenset[str]:
    """Returns the names of the attributes that a class's instances are made with."""
    assert isinstance(cls, type)
    made = (vars(base).get("__init__") for base in cls.__mro__)
    codes = (function.__code__ for function in made if isinstance(function, FunctionType))
    return frozenset(vars(nn.Module())).union(*(code.co_names for code in codes))


class StateCheck:
    """Compares the state that a graph is specialized on with what a :class:`Watch` sees."""

    def __init__(self, modules: ModelState) -> None:
        self._modules = modules
        self._differing: dict[HolderKey, tuple[str, str]] = {}
        self._seen: tuple[Watch, int] | None = None

    def hold(self, watch: Watch) -> bool:
        """Returns True if the state, as last looked at, is the one that was captured."""
        return self.difference(watch) is None

    def difference(self, watch: Watch) -> str | None:
        """Returns the first difference in words, or None.

        Of an object that is described by what it leads to, it names what changed, not the object.
        """
        if self._seen is None or self._seen[0] is not watch:
            self._compare(watch, {**watch.state, **self._modules.expected})
        elif self._seen[1] != watch.serial:
            self._compare(watch, watch.changed_since(self._seen[1]))
        self._seen = watch, watch.serial
        first = min(self._differing, key=lambda place: _ORDER.index(place[1]), default=None)
        if first is None:
            return None
        reason, path = self._differing[first]
        deeper = {place[0]: found for place, found in self._differing.items() if place != first}
        while path in deeper:
            reason, path = deeper.pop(path)
        return reason

    def _compare(self, watch: Watch, places: Iterable[HolderKey]) -> None:
        for place in places:
            self._differing.pop(place, None)
            if self._modules.excludes(place):
                continue
            expected, found = self._modules.expected.get(place), watch.state.get(place)
            difference = self._differ(place, expected, found, watch.names)
            if difference is not None:
                self._differing[place] = difference

    def _differ(
        self,
        place: HolderKey,
        old: Description | None,
        new: Description | None,
        names: Collection[str],
    ) -> tuple[str, str] | None:
        """Returns a difference in words, and the path of what differs; or None."""
        where = place[0] or "the model"
        if old == new or (place[1] == "hooks" and self._are_alike(old, new)):
            return None
        if old is None and place[1] in _REACHED:
            return None
        if old is None or new is None:
            return f"{where} is {'new' if old is None else 'gone'}", place[0]
        for name in {**old, **new}:
            if old.get(name) == new.get(name) or (place, name) in self._modules.written:
                continue
            if name not in old and name not in names and _is_unread(name, place, new):
                continue
            return f"{name} of {where} changed", f"{place[0]}.{name}".lstrip(".")
        return None

    def _are_alike(self, old: Description | None, new: Description | None) -> bool:
        """Returns True if hooks do the same; those that the graph calls must be identical."""
        before: Any = (old or {}).get("hooks", ())
        after: Any = (new or {}).get("hooks", ())
        return len(before) == len(after) and all(
            a[2] == b[2] if a[0] in self._modules.opaque else a[1] == b[1]
            for a, b in zip(before, after, strict=True)
        )


def _is_unread(name: Hashable, place: HolderKey, state: Description) -> bool:
    """Returns True if a new attribute that no code names is an object that hides nothing of the
    class, so that the trace cannot have met it. Libraries keep notes of their own on modules in
    this way."""
    if place[1] != "module":
        return False
    owner = state["the class"]
    assert isinstance(owner, Same)
    is_object = isinstance(state[name], (Same, FrozenObject))
    return is_object and not hasattr(owner.value, str(name))
