"""modules: the Python state of a model that a graph is specialized on.

A trace sees the modules, hooks, methods and Python values that exist at one time: a LoRA adapter's
scale, whether it is enabled, a processor, a forward that was replaced. In another state the model
may compute something else, which is another program. Here the state is described;
:mod:`pabc.runtime.state` compares it at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pabc.base.forward import state_of_part, state_within

from .frozen import Same, freeze
from .holders import Holder, HolderKind
from .walk import hook_path, walk_from

_BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"}
_CONTAINERS = (dict, list, set)
_TOLD_BY_PATH: tuple[HolderKind, ...] = ("container", "object", "slots")
ORDER = "the order of keys"
"""The name under which the description of a dictionary has its keys."""
_WITHIN = ("", ".", ":", "[")
"""Follows the path of something in the paths of what is within it."""
HolderKey = tuple[str, HolderKind]
"""The path and the kind of a holder."""
Description = dict[Hashable, Hashable]
"""The contents of a holder, by name; those of equal states are equal."""


@dataclass(frozen=True, eq=False)
class ModelState:
    """The Python state of a model that a graph is specialized on.

    Attributes:
        expected: the description of each place.
        opaque: paths of modules and hooks that the graph calls as they are, and of names that the
            forward only writes, such as tables that are built at the first call: what is reached
            through them alone is no part of the state.
        written: those names, by place.
        shared: places within opaque paths that are reached otherwise, too.
    """

    expected: Mapping[HolderKey, Description]
    opaque: frozenset[str]
    written: frozenset[tuple[HolderKey, Hashable]]
    shared: frozenset[HolderKey] = frozenset()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        opaque: Collection[str] = (),
        written: Collection[tuple[HolderKey, Hashable]] = (),
    ) -> ModelState:
        """Returns the state of a model as it is now.

        `opaque` are paths of modules and hooks, `written` names that the forward only writes.
        """
        within = (path if key is None else f"{path}.{key}" for (path, _), key in written)
        excluded = frozenset((*opaque, *within))
        roots: list[tuple[str, str | None, Any]] = [("", "", model)]
        walk = walk_from(roots, noted=excluded)
        around = walk_from(roots, barred=walk.noted) if excluded else walk
        reached = {id(holder.value) for holder in around.holders}
        expected: dict[HolderKey, Description] = {}
        shared = set()
        for place, holder, description in _describe_each(walk.holders):
            if _is_within(place, excluded):
                if id(holder.value) not in reached:
                    continue
                shared.add(place)
            expected[place] = expected.get(place, {}) | description
        return cls(expected, excluded, frozenset(written), frozenset(shared))

    def excludes(self, place: HolderKey) -> bool:
        """Returns True if a place is no part of the state."""
        return place not in self.shared and _is_within(place, self.opaque)


def _is_within(place: HolderKey, paths: Collection[str]) -> bool:
    path = place[0]
    return any(path.startswith(n) and path[len(n) :][:1] in _WITHIN for n in paths)


def is_state(holder: Holder) -> bool:
    """Returns False for a container of a module's own bookkeeping."""
    return holder.path.rpartition(".")[2] not in _BOOKKEEPING


def describe(holders: Iterable[Holder]) -> dict[HolderKey, Description]:
    """Returns the contents of holders, in a form that can be compared with a later state."""
    state: dict[HolderKey, Description] = {}
    for place, _, description in _describe_each(holders):
        state[place] = state.get(place, {}) | description
    return state


def _describe_each(
    holders: Iterable[Holder],
) -> Iterator[tuple[HolderKey, Holder, Description]]:
    """Yields holders with the place and the contents of each."""
    known = list(holders)
    paths = {id(h.value): h.path for h in known if h.kind in _TOLD_BY_PATH}
    taken: set[HolderKey] = set()
    for holder in known:
        description = _DESCRIBE[holder.kind](holder, paths)
        if description is not None:
            place = _find_place(holder, taken)
            taken.add(place)
            yield place, holder, description


def _find_place(holder: Holder, taken: Collection[HolderKey]) -> HolderKey:
    """Returns a key of its own for a holder: classes and functions may have the same name. Only a
    module's parameters and buffers are one place."""
    path, number = holder.path, 1
    while holder.kind != "tensors" and (path, holder.kind) in taken:
        number += 1
        path = f"{holder.path} ({number})"
    return path, holder.kind


Paths = Mapping[int, str]
"""The path under which each container, or object, is described, by its identity."""


def _describe_module(holder: Holder, paths: Paths) -> Description:
    find = state_of_part if holder.path else state_within
    state = find(holder.value, holder.owner)
    own: Description = {
        name: _value(x, paths) for name, x in state.items() if name not in _BOOKKEEPING
    }
    return {"the class": Same(holder.owner), **own}


def _describe_object(holder: Holder, paths: Paths) -> Description:
    """Tells tensors of an object by identity; those of modules are compared where they are read."""
    return {
        name: Same(x) if isinstance(x, torch.Tensor) else _value(x, paths)
        for name, x in holder.read().items()
    }


def _describe_children(holder: Holder, paths: Paths) -> Description:
    return {"what is a module": tuple((name, Same(m)) for name, m in holder.value.items())}


def _describe_tensors(holder: Holder, paths: Paths) -> Description:
    return {name: True for name, x in holder.value.items() if x is not None}


def _describe_hooks(holder: Holder, paths: Paths) -> Description | None:
    """Tells each hook by how a user finds it, by its frozen value, and by identity."""
    path = holder.path.rpartition("_forward")[0].rstrip(".")
    hooks = holder.value.values()
    frozen = tuple((hook_path(path, hook), freeze(hook), Same(hook)) for hook in hooks)
    return {"hooks": frozen} if frozen else None


def _describe_container(holder: Holder, paths: Paths) -> Description | None:
    if not is_state(holder):
        return None
    contents = _describe_object(holder, paths)
    is_ordered = issubclass(type(holder.value), dict)
    return {**contents, ORDER: tuple(contents)} if is_ordered else contents


def _value(value: Any, paths: Paths) -> Hashable:
    """Tells a container, or an object, by the path under which it is described."""
    if isinstance(value, torch.Tensor):
        return "a tensor"
    if type(value) in _CONTAINERS:
        return f"a {type(value).__name__}", paths.get(id(value))
    return freeze(value, paths)


_DESCRIBE: dict[HolderKind, Callable[[Holder, Paths], Description | None]] = {
    "module": _describe_module,
    "object": _describe_object,
    "children": _describe_children,
    "tensors": _describe_tensors,
    "hooks": _describe_hooks,
    "container": _describe_container,
    "slots": _describe_object,
    "array": _describe_object,
    "variable": _describe_object,
    "class": _describe_object,
    "globals": _describe_object,
}
