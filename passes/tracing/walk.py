"""walk: finds every holder that a forward can write to, under the path by which a user finds it."""

from __future__ import annotations

import argparse
import functools
import gc
import random
import weakref
from collections import ChainMap, UserDict, UserList, deque
from collections.abc import Collection, Iterable
from types import (
    CellType,
    CodeType,
    FunctionType,
    MappingProxyType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import numpy as np
import torch
from torch import nn

from pabc.base.forward import AROUND
from pabc.internals.modules import BUFFERS, CHILDREN, FORWARD_HOOKS, FORWARD_PRE_HOOKS, PARAMETERS

from .frozen import is_library, slots_of
from .globals import ENTRIES, CodeScan, is_of_library
from .holders import CONTAINERS, Holder, HolderKind

HOOKS = (FORWARD_PRE_HOOKS, FORWARD_HOOKS)
_PLAIN_OBJECTS = (
    SimpleNamespace,
    argparse.Namespace,
    UserDict,
    UserList,
    ChainMap,
    weakref.WeakKeyDictionary,
    weakref.WeakValueDictionary,
)
"""Objects of Python's own library that hold what others put into them."""
_ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.Tensor, torch.dtype)
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)
_LARGE = 1 << 20
"""Values of arrays with more bytes are not compared."""
_MANY = 10_000
"""Containers with more entries, such as a vocabulary, are compared but not walked into."""
_CODE = (FunctionType, staticmethod, classmethod, property)


def find_holders(roots: Iterable[tuple[str, str | None, Any]]) -> list[Holder]:
    """Returns the holders that are reached from the roots, each once, under its first path."""
    return walk_from(roots).holders


def walk_from(
    roots: Iterable[tuple[str, str | None, Any]],
    *,
    noted: Collection[str] = (),
    barred: Iterable[Any] = (),
) -> StateWalk:
    """Returns the walk over all that is reached from the roots.

    `noted`: paths whose values the walk keeps; `barred`: values that it does not go through.
    """
    walk = StateWalk(noted, barred)
    for path, module, value in roots:
        walk.visit(path, module, value)
    walk.visit_code()
    return walk


class StateWalk:
    """A walk over the contents of objects, breadth first, so that paths are short.

    Attributes:
        holders: the holders that were found.
        iterators: paths of objects whose state cannot be seen.
        functions: those that may be called.
        names: what methods of modules name, and functions that objects hold.
        noted: what was found at the paths to note.
    """

    def __init__(self, noted: Collection[str] = (), barred: Iterable[Any] = ()) -> None:
        """Takes paths whose values are kept, and values that are not looked into."""
        self.holders: list[Holder] = []
        self.iterators: list[str] = []
        self.functions: tuple[FunctionType, ...] = ()
        self.names: frozenset[str] = frozenset()
        self.noted: list[Any] = []
        self._to_note = frozenset(noted)
        self._kept: list[Any] = [
            *barred
        ]  # so that no other object takes the address of one that was seen
        self._seen: set[int] = set(map(id, self._kept))
        self._classes: dict[type, None] = {}
        self._functions: dict[FunctionType, None] = {}
        self._waiting: deque[tuple[str, str | None, Any]] = deque()

    def visit(self, path: str, module: str | None, value: Any) -> None:
        """Adds a value and all that is reached from it."""
        self._later((path, module, value))
        while self._waiting:
            self._note(*self._waiting.popleft())

    def visit_code(self) -> None:
        """Adds classes, and the globals that reachable code names."""
        scan = CodeScan(self._functions)
        names: dict[int, tuple[dict[str, Any], str, set[str]]] = {}
        done: set[type] = set()
        known_functions = -1
        while True:
            fresh = [cls for cls in self._classes if cls not in done]
            for cls in fresh:
                done.add(cls)
                own = frozenset(ENTRIES) if is_library(cls.__module__) else None
                holder = Holder(f"class {cls.__qualname__}", None, cls, "class", None, own)
                self.holders.append(holder)
                if own is not None:  # PyTorch sets attributes of its own classes
                    continue
                for name, value in vars(cls).items():
                    if not name.startswith("__") and not isinstance(value, _CODE):
                        self.visit(holder.name_of(name), None, value)
            for space, name in scan.follow(fresh):
                file = str(space.get("__name__", "?"))
                _, _, known = names.setdefault(id(space), (space, file, set()))
                if name not in known:
                    known.add(name)
                    self.visit(f"{file}.{name}", None, space[name])
            for function in filter(_holds_something, tuple(scan.functions)):
                self.visit(f"{function.__module__}.{function.__qualname__}", None, function)
            if not fresh and len(scan.functions) == known_functions:
                break
            known_functions = len(scan.functions)
        self.functions, self.names = tuple(scan.functions), frozenset(scan.names_of_modules)
        for space, file, known in names.values():
            self.holders.append(Holder(file, None, space, "globals", None, frozenset(known)))

    def _note(self, path: str, module: str | None, value: Any) -> None:
        if path in self._to_note:
            self.noted.append(value)
        if id(value) in self._seen or isinstance(value, (torch.Tensor, ModuleType, CodeType)):
            return
        self._seen.add(id(value))
        self._kept.append(value)
        if isinstance(value, nn.Module):
            self._note_module(path, module, value)
        elif isinstance(value, type):
            self._add_class(value)
        elif isinstance(value, FunctionType):
            self._note_function(path, module, value)
        elif isinstance(value, MethodType):
            self._later((path, module, value.__self__), (path, module, value.__func__))
        elif isinstance(value, functools.partial):
            if isinstance(value.func, FunctionType) and is_of_library(value.func):
                return
            inner = (value.func, *value.args, *value.keywords.values())
            self._later(*((path, module, x) for x in inner))
        elif isinstance(value, CellType):
            self._hold(path, module, value, "variable")
        else:
            self._note_object(path, module, value)

    def _note_module(self, path: str, module: str | None, value: nn.Module) -> None:
        """Adds a module's attributes; `module` is None for one that is no part of the model."""
        own = None if module is None else path
        self._add_class(type(value))
        self._add(Holder(path, own, vars(value), "module", type(value)))
        for name, item in vars(value).items():
            if not path and name in AROUND:
                continue
            if name == CHILDREN:
                self._add(Holder(path, own, item, "children"))
                for child, inner in item.items():
                    inner_path = _join(path, child)
                    self._later((inner_path, None if own is None else inner_path, inner))
            elif name in (PARAMETERS, BUFFERS):
                self._add(Holder(path, own, item, "tensors"))
            elif name in HOOKS:
                self._add(Holder(_join(path, name), own, item, "hooks"))
                self._later(*((hook_path(path, hook), own, hook) for hook in item.values()))
            else:
                self._later((_join(path, name), own, item))

    def _note_function(self, path: str, module: str | None, function: FunctionType) -> None:
        """Adds the variables that a function closes over, and its defaults."""
        if is_of_library(function):
            return
        self._functions[function] = None
        code = function.__code__
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            self._later((f"{path}: {name}", module, cell))
        self._later((path, module, function.__defaults__), (path, module, function.__kwdefaults__))
        self._later((path, module, vars(function)))

    def _note_object(self, path: str, module: str | None, value: Any) -> None:
        if issubclass(type(value), CONTAINERS):
            self._hold(path, module, value)
        elif isinstance(value, (tuple, frozenset)):
            self._later(*((f"{path}[{i}]", module, x) for i, x in enumerate(value)))
        elif isinstance(value, MappingProxyType):
            self._later(*((path, module, x) for x in gc.get_referents(value)))
        elif isinstance(value, np.ndarray):
            if value.nbytes <= _LARGE and value.dtype != object and value.flags.writeable:
                self._add(Holder(path, module, value, "array"))
        elif hasattr(type(value), "__next__") or isinstance(value, _GENERATORS):
            self.iterators.append(path)
        cls: Any = type(value)
        slots = slots_of(cls)
        if slots and not is_library(type(value).__module__):
            self._add_class(type(value))
            self._add(Holder(path, module, value, "slots", type(value), slots))
            self._later(*((f"{path}.{n}", module, getattr(value, n, None)) for n in slots))
        if not isinstance(getattr(value, "__dict__", None), dict):
            return
        if is_library(type(value).__module__) and not isinstance(value, _PLAIN_OBJECTS):
            return
        self._add_class(type(value))
        if id(vars(value)) not in self._seen:
            self._hold(path, module, vars(value), "object", type(value))

    def _add(self, holder: Holder) -> None:
        self._seen.add(id(holder.value))
        self.holders.append(holder)

    def _hold(
        self,
        path: str,
        module: str | None,
        value: Any,
        kind: HolderKind = "container",
        owner: type | None = None,
    ) -> None:
        holder = Holder(path, module, value, kind, owner)
        self._add(holder)
        contents = holder.read()
        if len(contents) <= _MANY:
            self._later(*((holder.name_of(key), module, x) for key, x in contents.items()))

    def _later(self, *values: tuple[str, str | None, Any]) -> None:
        self._waiting.extend(v for v in values if not isinstance(v[2], _ATOMS))

    def _add_class(self, cls: type) -> None:
        for base in cls.__mro__:
            if issubclass(base, nn.Module) or not is_library(base.__module__):
                self._classes[base] = None


def _holds_something(function: FunctionType) -> bool:
    """Returns True for a function with variables of its own, or defaults."""
    held = function.__closure__, function.__defaults__, function.__kwdefaults__, vars(function)
    return any(held)


def hook_path(path: str, hook: Any) -> str:
    """Returns the path by which a user finds a hook of the module at `path`."""
    name = getattr(hook, "__qualname__", None) or type(hook).__qualname__
    return _join(path, f"hook {name}")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
