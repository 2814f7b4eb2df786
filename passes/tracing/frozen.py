"""frozen: Python values in a form that can be compared with later values.

Containers and arrays, which can change in place, are compared by identity: the walk over a model's
state (:mod:`pabc.passes.tracing.walk`) visits their contents. So are tensors and modules. Functions
and objects are equal if they are alike: libraries that set a hook for one call create it anew each
time.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Hashable
from dataclasses import dataclass
from types import FunctionType, MethodType
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
    """An object that is compared by its attributes."""

    kind: type
    held: Hashable


def freeze(value: Any) -> Hashable:
    """Returns a hashable that is equal for equal values, now and later."""
    return _freeze(value, (), {})


def _freeze(value: Any, within: tuple[int, ...], known: dict[int, int]) -> Hashable:
    """Freezes a value. `within` are the identities of the objects around it, which may occur in it
    again; `known` the number of each object that was met, so that none is looked into twice."""
    if isinstance(value, PLAIN_VALUES):
        return type(value), value
    if id(value) in within:
        return "again", within.index(id(value))
    if id(value) in known:
        return "as before", known[id(value)]
    inner = (*within, id(value))
    if isinstance(value, FunctionType) and len(known) < _MANY:
        known[id(value)] = len(known)
        cells = (_freeze(_content(cell), inner, known) for cell in value.__closure__ or ())
        return FunctionType, value.__code__, tuple(cells), _freeze(value.__defaults__, inner, known)
    if isinstance(value, MethodType):
        return (
            MethodType,
            _freeze(value.__func__, inner, known),
            _freeze(value.__self__, inner, known),
        )
    if type(value) is functools.partial:
        parts = (value.func, value.args, *value.keywords.items())
        return functools.partial, tuple(_freeze(part, inner, known) for part in parts)
    if type(value) is tuple:
        return tuple, tuple(_freeze(item, inner, known) for item in value)
    if type(value) is frozenset:
        return frozenset, frozenset(_freeze(item, inner, known) for item in value)
    if _is_plain_object(value) and len(within) < 3 * _NESTING and len(known) < _MANY:
        known[id(value)] = len(known)
        kind: Any = type(value)
        names = (*getattr(value, "__dict__", ()), *sorted(slots_of(kind)))
        held = ((name, _freeze(getattr(value, name, None), inner, known)) for name in names)
        return FrozenObject(kind, tuple(held))
    return Same(value)


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
