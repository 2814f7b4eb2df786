"""frozen: Python values in a form that can be compared with later values.

Containers and arrays, which can change in place, are compared by identity: the walk over a model's
state (:mod:`pabc.passes.tracing.walk`) visits their contents. So are tensors and modules. Functions
and objects are equal if they are alike, since libraries that set a hook for one call create it anew
each time: by all they hold, or, where the walk visits them, by their class and their path.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from types import FunctionType, MappingProxyType, MethodType
from typing import Any

import torch
from torch import nn

LIBRARIES = frozenset({"torch", "torchgen", "triton", "numpy", "sympy", "mpmath", "einops"}) | (
    sys.stdlib_module_names - {"__main__"}
)
"""Packages whose objects and functions are not looked into; they manage their own state."""
_OWN = tuple(
    f"{__name__.partition('.')[0]}.{part}"
    for part in (
        "base",
        "passes",
        "kernels",
        "runtime",
        "pipelines",
        "comfyui",
        "artifact",
        "compiled",
        "inplace",
    )
)
PLAIN_VALUES = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.Size,
    type(None),
)
_NESTING = 4
"""The depth to which objects within objects are compared by their attributes."""
_MANY = 100
"""The number of objects within one that are looked into; others are compared by identity."""
PLACE = "the place"
"""The name under which an object that is described elsewhere has the path of that place."""


def is_library(name: Any) -> bool:
    """Returns True for the name of a module in a package whose state is not looked into."""
    return str(name).partition(".")[0] in LIBRARIES or str(name).startswith(_OWN)


class Same:
    """An object that equals itself alone. It is kept alive, so that no other gets its address."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        return f"this {type(self.value).__name__}"


@dataclass(frozen=True, slots=True)
class FrozenObject:
    """An object that is compared by its attributes.

    Attributes:
        kind: its class.
        held: names and frozen values of its attributes; or :data:`PLACE` and the path under which
            these are described.
    """

    kind: type
    held: tuple[tuple[str, Hashable], ...]


def freeze(value: Any, paths: Mapping[int, str] = MappingProxyType({})) -> Hashable:
    """Returns a hashable that is equal for equal values, now and later.

    `paths`: where objects are described, by the identity of their attributes' dictionary, or of
    objects with slots alone. Those are told by their class and that path, others by all they hold.
    """
    return _Freezer(paths).freeze(value, ())


class _Freezer:
    """Freezes a value, and what is within it.

    Attributes:
        paths: see :func:`freeze`.
        known: the number of each object that was met, so that none is looked into twice.
    """

    def __init__(self, paths: Mapping[int, str]) -> None:
        self.paths = paths
        self.known: dict[int, int] = {}

    def freeze(self, value: Any, within: tuple[int, ...]) -> Hashable:
        """Freezes a value. `within` are the identities of the objects around it, which may occur in
        it again."""
        if isinstance(value, PLAIN_VALUES):
            return type(value), value
        if id(value) in within:
            return "again", within.index(id(value))
        if id(value) in self.known:
            return "as before", self.known[id(value)]
        inner = (*within, id(value))
        if isinstance(value, FunctionType) and len(self.known) < _MANY:
            self.known[id(value)] = len(self.known)
            cells = tuple(self.freeze(_content(cell), inner) for cell in value.__closure__ or ())
            return FunctionType, value.__code__, cells, self.freeze(value.__defaults__, inner)
        if isinstance(value, MethodType):
            function, owner = self.freeze(value.__func__, inner), self.freeze(value.__self__, inner)
            return MethodType, function, owner
        if type(value) is functools.partial:
            parts = (value.func, value.args, *value.keywords.items())
            return functools.partial, tuple(self.freeze(part, inner) for part in parts)
        if type(value) is tuple:
            return tuple, tuple(self.freeze(item, inner) for item in value)
        if type(value) is frozenset:
            return frozenset, frozenset(self.freeze(item, inner) for item in value)
        if _is_plain_object(value):
            return self._freeze_object(value, within)
        return Same(value)

    def _freeze_object(self, value: Any, within: tuple[int, ...]) -> Hashable:
        kind: Any = type(value)
        own = getattr(value, "__dict__", None)
        path = self.paths.get(id(value) if own is None else id(own))
        if path is not None:
            return FrozenObject(kind, ((PLACE, path),))
        if len(within) >= 3 * _NESTING or len(self.known) >= _MANY:
            return Same(value)
        self.known[id(value)] = len(self.known)
        names = (*(own or ()), *sorted(slots_of(kind)))
        inner = (*within, id(value))
        held = ((name, self.freeze(getattr(value, name, None), inner)) for name in names)
        return FrozenObject(kind, tuple(held))


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _is_plain_object(value: Any) -> bool:
    """Returns True for an object that its visible attributes describe completely."""
    kind = type(value)
    builtin = (nn.Module, torch.Tensor, type, dict, list, set, tuple)
    return not isinstance(value, builtin) and not is_library(kind.__module__)


@functools.cache
def slots_of(cls: Hashable) -> frozenset[str]:
    """Returns the names of the slots of a class's instances."""
    found: set[str] = set()
    assert isinstance(cls, type)
    for base in cls.__mro__:
        own = vars(base).get("__slots__", ())
        names = (own,) if isinstance(own, str) else own
        found.update(_mangle(base, name) for name in names)
    return frozenset(found - {"__dict__", "__weakref__"})


def _mangle(cls: type, name: str) -> str:
    """Returns the name that Python stores for a name in the body of a class."""
    is_private = name.startswith("__") and not name.endswith("__")
    return f"_{cls.__name__.lstrip('_')}{name}" if is_private else name
