"""frozen: Python values in a form that can be compared with what they are later on.

What can change in place (a container, an array) is compared by identity here: the walk over a
model's state (:mod:`pabc.passes.tracing.walk`) looks at what it holds. So are tensors and
modules. Functions and objects that are made anew alike are the same: libraries that set a hook for
one call make all of it anew each time.
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
"""Packages whose objects and functions are not looked into: their state is their own affair."""
_OWN = tuple(
    f"{__name__.partition('.')[0]}.{part}"
    for part in (
        "base",
        "passes",
        "kernels",
        "runtime",
        "pipelines",
        "artifact",
        "compiled",
        "inplace",
    )
)
_VALUES = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))
_NESTING = 4
"""How many objects within objects are compared by what they hold."""


def is_library(name: Any) -> bool:
    """Whether a module of that name is of a package whose state is its own affair."""
    return str(name).partition(".")[0] in LIBRARIES or str(name).startswith(_OWN)


class Same:
    """An object that equals itself alone; it stays alive, so that no other takes its address."""

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
    """An object that is what its attributes hold."""

    kind: type
    held: Hashable


def freeze(value: Any, within: tuple[int, ...] = ()) -> Hashable:
    """Returns something that equals what this function gives for the same value later on.

    `within`: the identities of the objects that hold it, which may be met again.
    """
    if isinstance(value, _VALUES):
        return type(value), value
    if id(value) in within:
        return "again", within.index(id(value))
    inner = (*within, id(value))
    if isinstance(value, FunctionType):
        cells = (freeze(_content(cell), inner) for cell in value.__closure__ or ())
        return FunctionType, value.__code__, tuple(cells), freeze(value.__defaults__, inner)
    if isinstance(value, MethodType):
        return MethodType, freeze(value.__func__, inner), freeze(value.__self__, inner)
    if type(value) is functools.partial:
        parts = (value.func, value.args, *value.keywords.items())
        return functools.partial, tuple(freeze(part, inner) for part in parts)
    if type(value) is tuple:
        return tuple, tuple(freeze(item, inner) for item in value)
    if type(value) is frozenset:
        return frozenset, frozenset(freeze(item, inner) for item in value)
    if _is_plain_object(value) and len(within) < 3 * _NESTING:
        kind: Any = type(value)
        names = (*getattr(value, "__dict__", ()), *sorted(slots_of(kind)))
        held = ((name, freeze(getattr(value, name, None), inner)) for name in names)
        return FrozenObject(kind, tuple(held))
    return Same(value)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _is_plain_object(value: Any) -> bool:
    """Whether an object is its attributes, all of which can be seen."""
    kind = type(value)
    builtin = (nn.Module, torch.Tensor, type, dict, list, set, tuple)
    return not isinstance(value, builtin) and not is_library(kind.__module__)


@functools.cache
def slots_of(cls: Hashable) -> frozenset[str]:
    """Returns the names of the attributes that instances have in slots."""
    found: set[str] = set()
    assert isinstance(cls, type)
    for base in cls.__mro__:
        own = vars(base).get("__slots__", ())
        found.update((own,) if isinstance(own, str) else own)
    return frozenset(found - {"__dict__", "__weakref__"})
