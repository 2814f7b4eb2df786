"""globals: finds the globals that a call may reach, by the names in the code of functions."""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from .frozen import PLAIN_VALUES, is_library

ENTRIES = ("forward", "__call__")
"""The methods that calls of a model, or of an object in it, start with."""
_NOT_CALLED = frozenset(
    ("__repr__", "__str__", "__del__", "__dir__", "__sizeof__", "__reduce__", "__reduce_ex__")
    + ("__getstate__", "__setstate__", "__init_subclass__", "__class_getitem__", "__deepcopy__")
)
"""Methods that a forward has no use for."""
_INSTALLED = frozenset({"site-packages", "dist-packages"})
"""Folders that packages are installed in."""


class CodeScan:
    """Finds the globals that a call may reach.

    A method may be reached if reachable code names it, in a string as well: on which object it is
    called is unknown. Python calls those named `__x__` by itself. Functions that are globals are
    followed, and what code names in modules of the user's.

    Attributes:
        functions: the functions that may be reached.
        names: what their code names: variables, attributes, and strings that may be such.
        names_of_modules: what methods of modules name, and functions that objects hold.
    """

    def __init__(self, functions: dict[FunctionType, None]) -> None:
        """Starts from functions that objects hold, such as replaced methods and hooks."""
        self._held = functions
        self._of_modules = set(functions)
        self.names: set[str] = set(ENTRIES)
        self.names_of_modules: set[str] = set()
        self._waiting: dict[str, list[FunctionType]] = {}
        self.functions: dict[FunctionType, None] = {}

    def follow(self, classes: Iterable[type]) -> Iterator[tuple[dict[str, Any], str]]:
        """Adds classes, and yields what is found: a dictionary of globals and a name in it."""
        ready = list(self._held)
        for cls in classes:
            for name, value in vars(cls).items():
                for function in _functions_in(value):
                    if issubclass(cls, nn.Module):
                        self._of_modules.add(function)
                    if name in self.names or _is_implicit(name, cls):
                        ready.append(function)
                    else:
                        self._waiting.setdefault(name, []).append(function)
        while ready:
            function = ready.pop()
            if function in self.functions or is_of_library(function):
                continue
            self.functions[function] = None
            named = _names_in(function.__code__)
            if function in self._of_modules:
                self.names_of_modules |= named
            for name in named - self.names:
                self.names.add(name)
                ready += self._waiting.pop(name, [])
            for space, name in _find_globals(function, named):
                ready += _functions_in(space[name])
                yield space, name


def _find_globals(
    function: FunctionType, named: frozenset[str]
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields the globals of a function, and those of modules of the user's that code may read as
    their attributes: a dictionary and a name in it.

    Of another installed package's modules, only numbers, strings and the like are yielded: its
    functions and objects may lead to all that a process holds.
    """
    package = _package_of(function.__globals__)
    waiting = [(function.__globals__, _globals_in(function.__code__), True)]
    entered = set()
    while waiting:
        space, names, is_own = waiting.pop()
        for name in names & space.keys():
            value = space[name]
            if not isinstance(value, ModuleType):
                if is_own or isinstance(value, PLAIN_VALUES):
                    yield space, name
            elif not is_library(value.__name__) and value not in entered:
                entered.add(value)
                inner = vars(value)
                waiting.append((inner, named, _package_of(inner) in (None, package)))


def _package_of(space: dict[str, Any]) -> str | None:
    """Returns the installed package that globals belong to, or None for a user's own code."""
    is_installed = _is_installed(str(space.get("__file__")))
    return str(space.get("__name__")).partition(".")[0] if is_installed else None


@functools.cache
def _is_installed(file: str) -> bool:
    return not _INSTALLED.isdisjoint(Path(file).parts)


def _is_implicit(name: str, cls: type) -> bool:
    """Returns True for a method that Python may call though no code names it."""
    is_special = name.startswith("__") and name.endswith("__") and name not in _NOT_CALLED
    return is_special and not (name == "__init__" and issubclass(cls, nn.Module))


def _functions_in(value: Any) -> list[FunctionType]:
    """Returns the functions behind a class attribute or a global, decorated ones included."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    parts = [value.fget] if isinstance(value, property) else [value]
    found = []
    for part in parts:
        while part is not None and not isinstance(part, FunctionType):
            part = getattr(part, "__wrapped__", None) if callable(part) else None
        while part is not None:  # what a decorator wraps runs as well
            found.append(part)
            part = getattr(part, "__wrapped__", None)
            part = part if isinstance(part, FunctionType) else None
    return found


@functools.cache
def _names_in(code: CodeType) -> frozenset[str]:
    """Returns the names in the code, and the strings: `getattr` and `hasattr` take such."""
    inner = (_names_in(c) for c in code.co_consts if isinstance(c, CodeType))
    strings = (c for c in code.co_consts if isinstance(c, str) and c.isidentifier())
    return frozenset(code.co_names).union(strings, *inner)


@functools.cache
def _globals_in(code: CodeType) -> frozenset[str]:
    """Returns the names in the code that stand for globals, not attributes."""
    inner = (_globals_in(c) for c in code.co_consts if isinstance(c, CodeType))
    own = (i.argval for i in dis.get_instructions(code) if i.opname.endswith(("_GLOBAL", "_NAME")))
    return frozenset(own).union(*inner)


def is_of_library(function: FunctionType) -> bool:
    """Returns True if the code lies in a library: `functools.wraps` copies another `__module__`."""
    return is_library(function.__globals__.get("__name__"))
