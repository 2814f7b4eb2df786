"""Computes digests of the code of a model's modules, so that an edited forward is detected.

A digest covers the methods of a module's classes, and the functions, classes and plain constants
that they reach by name; installed libraries are represented by their versions. Comments, formatting
and line numbers do not change it.
"""

from __future__ import annotations

import dis
import hashlib
import importlib.metadata
import inspect
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import chain
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
_READS = ("LOAD_ATTR", "LOAD_METHOD")
_CONSTANT_TYPES = (bool, int, float, complex, str, bytes, type(None))


@dataclass(frozen=True, slots=True)
class ClassCode:
    """The code of a class.

    Attributes:
        digest: SHA-256 as hex; empty if all of the code comes from installed libraries.
        versions: names and versions of these libraries.
    """

    digest: str
    versions: tuple[tuple[str, str], ...]


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
    return ClassCode(digest, versions)


@lru_cache(maxsize=256)
def attributes_forward_sets(kind: type) -> frozenset[str]:
    """Returns the attributes that a class's `forward` sets, or methods that it reaches by name."""
    return frozenset().union(*(_attributes(c, "STORE_ATTR") for c in _reached(kind)))


@lru_cache(maxsize=256)
def attributes_forward_reads(kind: type) -> frozenset[str]:
    """Returns the attributes that a class's `forward` reads, or methods that it reaches by name."""
    return frozenset().union(*(_attributes(c, *_READS) for c in _reached(kind)))


@lru_cache(maxsize=256)
def attributes_methods_read(kind: type) -> frozenset[str]:
    """Returns the attributes that the methods of a class and of its bases read."""
    return frozenset().union(*(_attributes(c, *_READS) for c in chain(*_methods(kind).values())))


def attributes_code_reads(code: CodeType) -> frozenset[str]:
    """Returns the attributes that the code of a function reads."""
    return _attributes(code, *_READS)


def _reached(kind: type) -> list[CodeType]:
    """Returns the code of `forward`, and of the methods that it reaches by name."""
    methods = _methods(kind)
    waiting, reached = ["forward", "__call__"], set[str]()
    while waiting:
        name = waiting.pop()
        if name in methods and name not in reached:
            reached.add(name)
            waiting += [n for m in methods[name] for code in _nested(m) for n in code.co_names]
    return [code for name in reached for code in methods[name]]


def _methods(kind: type) -> dict[str, list[CodeType]]:
    """Returns the code of a class's methods and properties by name, with those they override."""
    found: dict[str, list[CodeType]] = {}
    for base in kind.__mro__:
        for name, value in vars(base).items():
            function: Any = value.fget if isinstance(value, property) else value
            function = inspect.unwrap(getattr(function, "__func__", function))
            if isinstance(function, FunctionType):
                found.setdefault(name, []).append(function.__code__)
    return found


@cache
def version(library: str) -> str:
    """Returns the version of an installed library; empty if there is no such library."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""


@lru_cache(maxsize=4096)
def digest_code(code: CodeType) -> str:
    """Returns a digest of the code of a function, and of those that are nested in it."""
    lines = (line for part in _nested(code) for line in _of_code(part))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


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
            yield from _of_code(code)
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


def _of_code(code: CodeType) -> tuple[str, str]:
    names = (code.co_names, code.co_varnames, [*map(_constant, code.co_consts)])
    return code.co_code.hex(), repr(names)


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
