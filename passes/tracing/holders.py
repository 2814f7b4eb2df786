"""holders: places that Python code can write to, and what they hold."""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True)
class Holder:
    """A place that Python code can write to.

    Attributes:
        path: how a user finds it: `blocks.1`, `blocks.1.attn.processor`, `cache['k']`.
        module: the qualified name of the module from which it was reached; None: it was not.
        value: a dictionary, list, set, cell, class, array, or object with slots.
        kind: what it is of: the attributes of an object, or of a module; a module's children,
            its parameters or buffers, its hooks; a container; a variable; a class; globals;
            attributes in slots; the values of a NumPy array.
        owner: whose attributes they are: its class; None: no object's.
        names: of globals, those that the code names; of slots, all; of a library's class, those
            that a call begins with; None: all are looked at.
    """

    path: str
    module: str | None
    value: Any
    kind: HolderKind = "container"
    owner: type | None = None
    names: frozenset[str] | None = None

    def read(self) -> dict[Any, Any]:
        """What it holds, by key."""
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
        if isinstance(value, dict):
            return dict(value)
        if isinstance(value, CellType):
            try:
                return {"": value.cell_contents}
            except ValueError:  # empty
                return {}
        if isinstance(value, set):
            return {item: item for item in value}
        return dict(enumerate(value))

    def write(self, contents: dict[Any, Any]) -> None:
        """Makes it hold that again."""
        value = self.value
        if self.kind == "array":
            value[...] = np.frombuffer(contents[""], value.dtype).reshape(value.shape)
        elif self.names is not None or isinstance(value, type):
            self._write_names(contents)
        elif isinstance(value, dict):
            value.clear()
            value.update(contents)
        elif isinstance(value, CellType):
            if contents:
                value.cell_contents = contents[""]
            else:
                del value.cell_contents
        elif isinstance(value, set):
            value.clear()
            value.update(contents)
        else:
            value.clear()
            value.extend(contents.values())

    def _write_names(self, contents: Mapping[str, Any]) -> None:
        """Puts attributes, or a module's globals, back one by one."""
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
        """How a user finds what it holds under a key."""
        if isinstance(self.value, CellType) or self.kind == "array":
            return self.path
        if self.kind in _NAMED:
            return f"{self.path}.{key}" if self.path else str(key)
        return f"{self.path}[{key!r}]"


@dataclass(frozen=True, slots=True)
class Change:
    """What a holder has under a key, before and after; :data:`MISSING` where it has nothing."""

    holder: Holder
    key: Any
    old: Any
    new: Any

    @property
    def name(self) -> str:
        """How a user finds it."""
        return self.holder.name_of(self.key)
