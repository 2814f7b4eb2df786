"""globals: finds the globals that a call may reach, by the names in the code of functions."""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from .frozen import is_library

ENTRIES = ("forward", "__call__")
"""The methods that calls of a model, or of an object in it, start with."""


class CodeScan:
    """Finds the globals that a call may reach.

    A method may be reached if reachable code names it: on which object it is called is unknown.
    Functions that are globals themselves are followed.
    """

    def __init__(self, functions: dict[FunctionType, None]) -> None:
        """Starts from functions that objects hold, such as replaced methods and hooks."""
        self._held = functions
        self._called: set[str] = set(ENTRIES)
        self._waiting: dict[str, list[FunctionType]] = {}
        self._scanned: set[FunctionType] = set()

    def follow(self, classes: Iterable[type]) -> Iterator[tuple[dict[str, Any], str]]:
        """Adds classes, and yields what is found: a dictionary of globals and a name in it."""
        ready = list(self._held)
        for cls in classes:
            for name, value in vars(cls).items():
                for function in _functions_in(value):
                    if name in self._called:
                        ready.append(function)
                    else:
                        self._waiting.setdefault(name, []).append(function)
        while ready:
            function = ready.pop()
            if function in self._scanned or is_of_library(function):
                continue
            self._scanned.add(function)
            for name in _names_in(function.__code__) - self._called:
                self._called.add(name)
                ready += self._waiting.pop(name, [])
            for name in _globals_in(function.__code__) & function.__globals__.keys():
                value = function.__globals__[name]
                ready += _functions_in(value)
                if not isinstance(value, ModuleType):
                    yield function.__globals__, name


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
    inner = (_names_in(c) for c in code.co_consts if isinstance(c, CodeType))
    return frozenset(code.co_names).union(*inner)


@functools.cache
def _globals_in(code: CodeType) -> frozenset[str]:
    """Returns the names in the code that stand for globals, not attributes."""
    inner = (_globals_in(c) for c in code.co_consts if isinstance(c, CodeType))
    own = (i.argval for i in dis.get_instructions(code) if i.opname.endswith(("_GLOBAL", "_NAME")))
    return frozenset(own).union(*inner)


def is_of_library(function: FunctionType) -> bool:
    """Returns True if the code lies in a library: `functools.wraps` copies another `__module__`."""
    return is_library(function.__globals__.get("__name__"))
