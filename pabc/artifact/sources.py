"""Computes digests of the code of a model's modules, so that an edited forward is detected.

A digest covers the methods of a module's classes, and the functions, classes and plain constants
that they reach by name; installed libraries are represented by their versions. Comments, formatting
and line numbers do not change it.
"""

from __future__ import annotations

import dis
import hashlib
import importlib.metadata
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

_FOLDERS = ("site-packages", "dist-packages")
_INSTALLED = tuple(
    str(Path(path).resolve())
    for path in (
        *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")),
        # Of the user, and of the Python that a virtual environment is based on.
        *(path for path in sys.path if Path(path).name in _FOLDERS),
    )
)
_CONSTANT_TYPES = (bool, int, float, complex, str, bytes, type(None))


@dataclass(frozen=True, slots=True)
class ClassCode:
    """The code of a class.

    Attributes:
        digest: SHA-256 as hex; empty if all of the code comes from installed libraries.
        versions: names and versions of these libraries.
        changing: attributes that methods other than `__init__` set: state, not settings.
        private: attributes with a leading underscore that the user's own methods read.
    """

    digest: str
    versions: tuple[tuple[str, str], ...]
    changing: frozenset[str]
    private: frozenset[str]


def code_of_class(kind: type) -> ClassCode:
    """Returns the code of a module's class, which is read once."""
    if kind not in _KNOWN:
        _KNOWN[kind] = _read_class(kind)
    return _KNOWN[kind]


def _read_class(kind: type) -> ClassCode:
    text = "\n".join(_CodeText().of_class(kind))
    digest = hashlib.sha256(text.encode()).hexdigest() if text else ""
    libraries = {base.__module__.partition(".")[0] for base in kind.__mro__}
    versions = tuple((name, found) for name in sorted(libraries) if (found := version(name)))
    methods = [
        (base, name, function.__code__)
        for base in kind.__mro__
        for name, function in vars(base).items()
        if isinstance(function, FunctionType)
    ]
    changing = [
        _attributes(code, "STORE_ATTR", "DELETE_ATTR")
        for _, name, code in methods
        if name != "__init__"
    ]
    own = {base for base in kind.__mro__ if not _is_library(base.__module__)}
    read = [
        _attributes(code, "LOAD_ATTR", "LOAD_METHOD") for base, _, code in methods if base in own
    ]
    private = {name for name in set().union(*read) if name.startswith("_")}
    return ClassCode(digest, versions, frozenset().union(*changing), frozenset(private))


@cache
def version(library: str) -> str:
    """Returns the version of an installed library; empty if there is no such library."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""


_KNOWN: WeakKeyDictionary[type, ClassCode] = WeakKeyDictionary()


class _CodeText:
    """The code of a class, and of all that it reaches by name, as lines of text to be hashed."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def of_class(self, kind: type) -> Iterator[str]:
        """Yields the lines of a class and its bases; installed classes have none."""
        for base in kind.__mro__:
            if _is_library(base.__module__) or id(base) in self._seen:
                continue
            self._seen.add(id(base))
            yield f"class {base.__qualname__}"
            for name, value in sorted(vars(base).items()):
                if name.startswith("__") and not isinstance(value, FunctionType):
                    continue
                yield from self._of_value(name, value)

    def _of_value(self, name: str, value: Any) -> Iterator[str]:
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if isinstance(value, property):
            value = value.fget
        value = getattr(value, "__wrapped__", value)
        if isinstance(value, FunctionType):
            yield from self._of_function(value)
        elif isinstance(value, type):
            yield from self.of_class(value)
        elif all(type(item) in _CONSTANT_TYPES for item in _items(value)):
            yield f"{name} = {value!r}"

    def _of_function(self, function: FunctionType) -> Iterator[str]:
        if _is_library(function.__module__) or id(function) in self._seen:
            return
        self._seen.add(id(function))
        yield f"def {function.__qualname__}"
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()):
            yield from self._of_value("", default)
        for code in _nested(function.__code__):
            yield code.co_code.hex()
            yield repr((code.co_names, code.co_varnames, [*map(_constant, code.co_consts)]))
            for name in code.co_names:
                if name in function.__globals__:
                    yield from self._of_global(name, function.__globals__[name])
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
        for name, cell in cells:
            yield from self._of_value(name, _contents(cell))

    def _of_global(self, name: str, value: Any) -> Iterator[str]:
        if not isinstance(value, ModuleType):
            yield from self._of_value(name, value)


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)


def _is_library(module: str | None) -> bool:
    """Returns True if a module belongs to an installed library or is built into Python."""
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    if module == "__main__" or file is None:
        return module != "__main__"
    return str(Path(file).resolve()).startswith(_INSTALLED)


def _nested(code: CodeType) -> Iterator[CodeType]:
    """Yields the code object and those of the functions nested in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _constant(value: Any) -> str:
    """Returns a constant of a function as text that is the same in every process."""
    if isinstance(value, CodeType):
        return value.co_name  # `_nested` yields the code itself
    if isinstance(value, frozenset):
        return repr(sorted(map(repr, value)))  # the order of a set differs between processes
    if isinstance(value, tuple):
        return repr([*map(_constant, value)])
    return repr(value)


@lru_cache(maxsize=1024)  # all modules share the methods of `nn.Module`
def _attributes(code: CodeType, *operations: str) -> frozenset[str]:
    """Returns the attributes that code accesses by the named bytecode operations."""
    return frozenset(
        str(instruction.argval)
        for part in _nested(code)
        for instruction in dis.get_instructions(part)
        if instruction.opname in operations
    )


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the variable is not assigned yet
        return None
