"""Describes the Python state of a model as a table of texts.

A graph is captured under values that its forward can reach: settings of modules, configurations,
adapters, replaced forwards, hooks, class attributes, globals. :mod:`pabc.runtime.state` compares
them within a process; the texts here are the same in every process of the same program.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from types import FunctionType
from typing import Any

import torch
from torch import nn

from pabc.artifact.sources import (
    attributes_code_reads,
    attributes_forward_reads,
    attributes_methods_read,
)
from pabc.artifact.texts import hash_of_bytes, hash_of_values, text_of, text_of_key
from pabc.passes import (
    ORDER,
    Description,
    Holder,
    HolderKind,
    Same,
    describe,
    find_holders,
    freeze,
    is_library,
)

StateTable = dict[str, dict[str, dict[str, str]]]
"""By kind of place and path: names and the texts of their values."""
KINDS: tuple[HolderKind, ...] = (
    *("module", "children", "hooks", "tensors", "object", "slots"),
    *("container", "array", "variable", "class", "globals"),
)
"""Kinds of places, those first that tell a user most."""
_OF_OBJECTS = ("object", "slots", "container")
_SHORT = 100
"""Lists of at most so many numbers and strings are compared as one value, too."""
_UNNAMED = "entries without a name"


@dataclass(frozen=True)
class DescribedState:
    """The Python state that a model's forward can reach.

    Attributes:
        table: its texts.
        owners: by path, the class of the module or object there.
    """

    table: StateTable
    owners: dict[str, type]


def describe_state(model: nn.Module) -> DescribedState:
    """Returns the Python state that a model's forward can reach, as it is now."""
    holders = find_holders([("", "", model)])
    owners = {_clean(h.path): h.owner for h in holders if h.owner}
    tensors = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    functions = (f for h in holders for f in h.read().values() if isinstance(f, FunctionType))
    read = frozenset().union(
        *map(attributes_forward_reads, {*owners.values()}),
        *(attributes_code_reads(f.__code__) for f in functions),
    )
    # Those that code alone reaches are found in no order that two processes share.
    paths = {id(h.value): _clean(h.path) for h in reversed(holders) if h.module is not None}
    return DescribedState(_Table(tensors, read, paths).of(holders), owners)


@dataclass
class _Table:
    """The table of some holders.

    Attributes:
        tensors: identities of the model's tensors, whose values are no part of the state.
        read: attributes that forwards, and functions that they reach, read.
        paths: the path at which an object is described, by the identity of what holds its contents.
    left_out: paths that are no part of the state.
    """

    tensors: Collection[int]
    read: Collection[str]
    paths: Mapping[int, str]
    left_out: set[str] = field(default_factory=set)

    def of(self, holders: Iterable[Holder]) -> StateTable:
        table: StateTable = {kind: {} for kind in KINDS}
        for holder in holders:
            if holder.owner is not None and issubclass(holder.owner, Enum):
                continue
            for (path, kind), description in describe([holder]).items():
                table[kind].setdefault(_clean(path), {}).update(self._texts(holder, description))
        starts = tuple(self.left_out)
        for places in table.values():
            for path in [p for p in places if p.startswith(starts) and self._is_within(p)]:
                del places[path]
        return table

    def _texts(self, holder: Holder, description: Description) -> Iterator[tuple[str, str]]:
        """Yields names and texts of what a holder has."""
        unnamed, contents = [], holder.read()
        for key, frozen in description.items():
            if key == ORDER:  # what a forward only writes, it may write in another order
                continue
            value = contents.get(key)
            if self._is_left_out(holder, key, value):
                self.left_out.add(_clean(holder.name_of(key)))
                continue
            name = text_of_key(key)
            text = self._text(holder, value, frozen) + self._elsewhere(value, holder.name_of(key))
            if name is None:
                unnamed.append(text)
            else:
                yield name, text
        if unnamed:
            yield _UNNAMED, hash_of_bytes(repr(sorted(unnamed)).encode())

    def _text(self, holder: Holder, value: Any, frozen: Hashable) -> str:
        """Returns the text of a value, which is described as `frozen`."""
        if holder.kind == "array":
            return f"values {hash_of_bytes(value)}"
        if holder.kind == "children":
            return ", ".join(self._child(holder, *item) for item in holder.value.items())
        if holder.kind == "hooks":
            hooks: Any = frozen
            return ", ".join(text_of(hook) for _, hook, _ in hooks)
        if isinstance(value, torch.Tensor) and holder.kind not in ("module", "tensors"):
            values = "" if id(value) in self.tensors else hash_of_values(value)
            return f"{text_of(Same(value))} {values}".rstrip()
        if _is_short_list(value):  # JSON makes lists of tuples
            return text_of(freeze(tuple(value)))
        return text_of(frozen)

    def _child(self, holder: Holder, name: str, module: nn.Module | None) -> str:
        path = f"{holder.path}.{name}" if holder.path else name
        return f"{name}: {text_of(freeze(module))}{self._elsewhere(module, path)}"

    def _elsewhere(self, value: Any, path: str) -> str:
        """Returns the path at which an object is described, if that is not the one given."""
        if isinstance(value, (torch.Tensor, Enum)) or _is_short_list(value):
            return ""  # these are told by value
        if isinstance(value, tuple):
            found = ((i, self._elsewhere(x, f"{path}[{i}]")) for i, x in enumerate(value))
            return "".join(f", {i}{where}" for i, where in found if where)
        own = getattr(value, "__dict__", None)
        first = self.paths.get(id(own)) if type(own) is dict else None
        first = first or self.paths.get(id(value))
        return "" if first is None or first == _clean(path) else f" at {first}"

    def _is_left_out(self, holder: Holder, key: Hashable, value: Any) -> bool:
        """Returns True for what Python or a library notes for itself."""
        if not isinstance(key, str):
            return False
        if holder.kind == "class":
            is_special = key.startswith("__") and key.endswith("__")
            is_of_abc = type(value).__module__ == "_abc"  # which subclasses are registered
            return is_of_abc or (is_special and not callable(value))
        kind = holder.owner or type(holder.value)
        if isinstance(getattr(kind, key, None), cached_property):
            return True
        if holder.kind not in _OF_OBJECTS:
            return False
        is_private = key.startswith("_") and not is_library(kind.__module__)
        return is_private and key not in self.read and key not in attributes_methods_read(kind)

    def _is_within(self, path: str) -> bool:
        found = (p for p in self.left_out if path.startswith(p))
        return any(path[len(p) :][:1] in ("", ".", "[", ":") for p in found)


def _is_short_list(value: Any) -> bool:
    if type(value) is not list or len(value) > _SHORT:
        return False
    return all(isinstance(x, (bool, int, float, str)) for x in value)


def _clean(path: str) -> str:
    """Returns a path without addresses."""
    return text_of_key(path) or path
