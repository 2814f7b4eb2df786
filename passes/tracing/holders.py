"""holders: places that Python code can write to, and their contents.

Containers are read and written as the class of Python's own does it. A subclass may answer with
something else than what it holds, such as an object that is made at each access.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import CellType
from typing import Any, Literal

import numpy as np


class Missing:
    """Stands for the value of a name that is not there."""

    def __repr__(self) -> str:
        return "nothing"


MISSING = Missing()


HolderKind = Literal[
    "object",
    "module",
    "children",
    "tensors",
    "hooks",
    "slots",
    "array",
    "container",
    "variable",
    "class",
    "globals",
]
_NAMED = frozenset({"object", "slots", "module", "children", "tensors", "class", "globals"})
"""Kinds whose keys are attributes, or names."""


CONTAINERS: tuple[type, ...] = (OrderedDict, dict, list, set, deque)


def container_class(value: Any) -> Any:
    """Returns the class of Python's own whose methods read and write what a container holds."""
    return next(base for base in CONTAINERS if issubclass(type(value), base))


@dataclass(frozen=True, slots=True)
class Holder:
    """A place that Python code can write to.

    Attributes:
        path: the path by which a user finds it: `blocks.1`, `blocks.1.attn.processor`,
            `cache['k']`.
        module: the qualified name of the module that it was reached from, or None.
        value: a dictionary, list, set, cell, class, array, or object with slots.
        kind: attributes of an object or of a module; a module's children, tensors (parameters or
            buffers), or hooks; a container; a variable that a function closes over; a class;
            globals; slots; the values of a NumPy array.
        owner: the class of the object whose attributes they are, or None.
        names: the keys that are read: of globals, those that code names; of slots, all; of a
            library's class, the methods that a call starts with. None means all.
    """

    path: str
    module: str | None
    value: Any
    kind: HolderKind = "container"
    owner: type | None = None
    names: frozenset[str] | None = None

    def read(self) -> dict[Any, Any]:
        """Returns the contents, by key."""
        value = self.value
        if self.kind == "slots":
            return {n: getattr(value, n) for n in self.names or () if hasattr(value, n)}
        if self.kind == "array":
            return {"": value.tobytes()}
        if self.names is not None:
            value = vars(value) if isinstance(value, type) else value
            return {name: value[name] for name in self.names if name in value}
        if isinstance(value, type):
            return dict(vars(value))
        if isinstance(value, CellType):
            try:
                return {"": value.cell_contents}
            except ValueError:  # empty
                return {}
        base = container_class(value)
        if issubclass(base, dict):
            return dict(base.items(value))
        if base is set:
            return {item: item for item in set.__iter__(value)}
        return dict(enumerate(base.__iter__(value)))

    def write(self, contents: dict[Any, Any]) -> None:
        """Replaces the contents by those that :meth:`read` returned earlier."""
        value = self.value
        if self.kind == "array":
            value[...] = np.frombuffer(contents[""], value.dtype).reshape(value.shape)
        elif self.names is not None or isinstance(value, type):
            self._write_names(contents)
        elif isinstance(value, CellType):
            if contents:
                value.cell_contents = contents[""]
            else:
                del value.cell_contents
        else:
            base = container_class(value)
            base.clear(value)
            if issubclass(base, dict):
                for key, item in contents.items():
                    base.__setitem__(value, key, item)
            elif base is set:
                set.update(value, contents)
            else:
                base.extend(value, contents.values())

    def _write_names(self, contents: Mapping[str, Any]) -> None:
        """Restores attributes, or globals, one by one."""
        now = self.read()
        is_dictionary = self.kind == "globals"
        for name in {**now, **contents}:
            if name not in contents:
                self.value.pop(name) if is_dictionary else delattr(self.value, name)
            elif now.get(name, MISSING) is not contents[name]:
                if is_dictionary:
                    self.value[name] = contents[name]
                else:
                    setter = object.__setattr__ if self.kind == "slots" else setattr  # frozen ones
                    setter(self.value, name, contents[name])

    def name_of(self, key: Any) -> str:
        """Returns the path by which a user finds the value under a key."""
        if isinstance(self.value, CellType) or self.kind == "array":
            return self.path
        if self.kind in _NAMED:
            return f"{self.path}.{key}" if self.path else str(key)
        return f"{self.path}[{key!r}]"


@dataclass(frozen=True, slots=True)
class Change:
    """The value of a holder under a key, before and after; :data:`MISSING` if there is none."""

    holder: Holder
    key: Any
    old: Any
    new: Any

    @property
    def name(self) -> str:
        """The path by which a user finds it."""
        return self.holder.name_of(self.key)
