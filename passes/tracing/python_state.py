"""python_state: what a model's forward can reach beside its tensors, found, compared and restored.

Attributes of modules and of the objects they hold, containers, variables that replaced methods and
hooks close over, class attributes, and the globals that the code of all these names. Each place
that Python code could write to is a :class:`Holder`. The same list serves three questions: what a
traced forward has left behind (:class:`Snapshot`), how that is undone, and whether the model still
is as it was captured (:mod:`pabc.passes.tracing.modules`).
"""

from __future__ import annotations

import argparse
import dis
import functools
import gc
import random
import weakref
from collections import UserDict, UserList, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from .around import AROUND
from .frozen import is_library, slots_of

HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_PLAIN_OBJECTS = (
    SimpleNamespace,
    argparse.Namespace,
    UserDict,
    UserList,
    weakref.WeakKeyDictionary,
    weakref.WeakValueDictionary,
)
"""Objects of Python's own library that hold what others put into them."""
_ENTRIES = ("forward", "__call__")
"""Methods that a call of a model, or of an object in it, begins with."""


class Missing:
    """Stands for the value of a name that is not there."""

    def __repr__(self) -> str:
        return "nothing"


MISSING = Missing()


Kind = Literal[
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
        names: of globals, those that the code names; of slots, all; None: all are looked at.
    """

    path: str
    module: str | None
    value: Any
    kind: Kind = "container"
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


Values = Literal["none", "unregistered", "all"]


class Snapshot:
    """What every holder that is reached from some roots holds at one time.

    Attributes:
        holders: what was reached.
        iterators: paths of objects whose state cannot be seen: iterators, generators of random
            numbers.
    """

    def __init__(
        self, roots: Iterable[tuple[str, str | None, Any]], *, values: Values = "none"
    ) -> None:
        """`roots`: path, module and value of each; see :class:`Holder`.

        `values`: of which tensors the values count as well. `"unregistered"`: of those that are no
        parameters or buffers, which a trace replaces by fake ones; they are restored. `"all"`: of
        all, which :class:`SavedWrites` restores.
        """
        walk = walk_from(roots)
        self.holders, self.iterators = walk.holders, walk.iterators
        self._contents = [holder.read() for holder in self.holders]
        self._versions: dict[int, tuple[torch.Tensor, int]] = {}
        self._values: list[tuple[torch.Tensor, int, torch.Tensor]] = []
        if values == "all":
            self._versions = {id(t): (t, t._version) for t in self.tensors(registered=True)}
        elif values == "unregistered":
            tensors = self.tensors(registered=False)
            self._values = [(t, t._version, t.detach().clone()) for t in tensors]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        arguments: Mapping[str, Any] | None = None,
        *,
        values: Values = "none",
    ) -> Snapshot:
        """All that a call of the model with these arguments can reach."""
        given = ((f"argument {name}", None, x) for name, x in (arguments or {}).items())
        return cls([("", "", model), *given], values=values)

    def changes(self) -> list[Change]:
        """What is not as it was."""
        return [
            Change(holder, key, old.get(key, MISSING), now.get(key, MISSING))
            for holder, old, now in self._read()
            for key in {**old, **now}
            if not _is_same(old.get(key, MISSING), now.get(key, MISSING))
            or self._is_written(now.get(key))
        ]

    def restore(self) -> None:
        """Makes everything as it was; what has not changed is not written to."""
        for holder, old, now in self._read():
            if old.keys() != now.keys() or not all(_is_same(now[key], old[key]) for key in old):
                holder.write(old)
        for tensor, version, value in self._values:
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(value)

    def _is_written(self, value: Any) -> bool:
        """Whether a tensor has other values than it had."""
        known = self._versions.get(id(value))
        return known is not None and known[0]._version != known[1]

    def tensors(self, *, registered: bool) -> Iterator[torch.Tensor]:
        """Yields the tensors that are held; `registered`: parameters and buffers as well."""
        for holder, contents in zip(self.holders, self._contents, strict=True):
            if holder.kind == "tensors" and not registered:
                continue
            for value in contents.values():
                if isinstance(value, torch.Tensor) and not value.is_inference():
                    yield value

    def _read(self) -> Iterator[tuple[Holder, dict[Any, Any], dict[Any, Any]]]:
        for holder, contents in zip(self.holders, self._contents, strict=True):
            yield holder, contents, holder.read()


def _is_same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is bytes and type(b) is bytes and a == b)  # the values of an array


def find_holders(roots: Iterable[tuple[str, str | None, Any]]) -> list[Holder]:
    """Returns every holder that is reached from the roots, each once, under its first path."""
    return walk_from(roots).holders


def walk_from(roots: Iterable[tuple[str, str | None, Any]]) -> _Walk:
    """Returns the walk over all that is reached from the roots."""
    walk = _Walk()
    for path, module, value in roots:
        walk.visit(path, module, value)
    walk.visit_code()
    return walk


class _Walk:
    """A walk over what objects hold, breadth first, so that paths are short."""

    def __init__(self) -> None:
        self.holders: list[Holder] = []
        self.iterators: list[str] = []
        self._seen: set[int] = set()
        self._kept: list[Any] = []  # so that no other object takes the address of one that was seen
        self._classes: dict[type, None] = {}
        self._functions: dict[FunctionType, None] = {}
        self._waiting: deque[tuple[str, str | None, Any]] = deque()

    def visit(self, path: str, module: str | None, value: Any) -> None:
        """Notes a value and all that is reached from it."""
        self._later((path, module, value))
        while self._waiting:
            self._note(*self._waiting.popleft())

    def visit_code(self) -> None:
        """Notes classes, and the globals named by code that a call can come to."""
        scan = _CodeScan(self._functions)
        names: dict[int, tuple[dict[str, Any], str, set[str]]] = {}
        done: set[type] = set()
        while True:
            fresh = [cls for cls in self._classes if cls not in done]
            for cls in fresh:
                done.add(cls)
                holder = Holder(f"class {cls.__qualname__}", None, cls, "class")
                self.holders.append(holder)
                for name, value in vars(cls).items():
                    if not name.startswith("__") and not isinstance(value, _CODE):
                        self.visit(holder.name_of(name), None, value)
            for space, name in scan.follow(fresh):
                file = str(space.get("__name__", "?"))
                _, _, known = names.setdefault(id(space), (space, file, set()))
                if name not in known:
                    known.add(name)
                    self.visit(f"{file}.{name}", None, space[name])
            if not fresh:
                break
        for space, file, known in names.values():
            self.holders.append(Holder(file, None, space, "globals", None, frozenset(known)))

    def _note(self, path: str, module: str | None, value: Any) -> None:
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
            if isinstance(value.func, FunctionType) and _is_of_library(value.func):
                return
            inner = (value.func, *value.args, *value.keywords.values())
            self._later(*((path, module, x) for x in inner))
        elif isinstance(value, CellType):
            self._hold(path, module, value, "variable")
        else:
            self._note_object(path, module, value)

    def _note_module(self, path: str, module: str | None, value: nn.Module) -> None:
        """A module's attributes; `module` None: one that is no part of the model."""
        own = None if module is None else path
        self._add_class(type(value))
        self._add(Holder(path, own, vars(value), "module", type(value)))
        for name, item in vars(value).items():
            if not path and name in AROUND:
                continue
            if name == "_modules":
                self._add(Holder(path, own, item, "children"))
                for child, inner in item.items():
                    inner_path = _join(path, child)
                    self._later((inner_path, None if own is None else inner_path, inner))
            elif name in ("_parameters", "_buffers"):
                self._add(Holder(path, own, item, "tensors"))
            elif name in HOOKS:
                self._add(Holder(_join(path, name), own, item, "hooks"))
                self._later(*((hook_path(path, hook), own, hook) for hook in item.values()))
            else:
                self._later((_join(path, name), own, item))

    def _note_function(self, path: str, module: str | None, function: FunctionType) -> None:
        """The variables that a function closes over, and what its defaults hold."""
        if _is_of_library(function):
            return
        self._functions[function] = None
        code = function.__code__
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            self._later((f"{path}: {name}", module, cell))
        self._later((path, module, function.__defaults__), (path, module, function.__kwdefaults__))
        self._later((path, module, vars(function)))

    def _note_object(self, path: str, module: str | None, value: Any) -> None:
        if isinstance(value, (dict, list, set, deque)):
            self._hold(path, module, value)
        elif isinstance(value, (tuple, frozenset)):
            self._later(*((f"{path}[{i}]", module, x) for i, x in enumerate(value)))
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
        kind: Kind = "container",
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


_ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.Tensor, torch.dtype)
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)
_LARGE = 1 << 20
"""Bytes of an array above which its values are not looked at."""
_MANY = 10_000
"""Entries above which a container is looked at, but not into: a vocabulary, say."""


def hook_path(path: str, hook: Any) -> str:
    """Returns how a user finds a hook of the module at `path`."""
    name = getattr(hook, "__qualname__", None) or type(hook).__qualname__
    return _join(path, f"hook {name}")


_CODE = (FunctionType, staticmethod, classmethod, property)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _is_of_library(function: FunctionType) -> bool:
    """By where its code is: `functools.wraps` copies the name of another module."""
    return is_library(function.__globals__.get("__name__"))


class _CodeScan:
    """Finds the globals that a call can come to, by the names in the code of methods.

    A method counts if code that counts has its name in it: which object it is called on is not
    known. Functions that are globals themselves are followed.
    """

    def __init__(self, functions: dict[FunctionType, None]) -> None:
        """`functions`: those that objects hold: replaced methods, hooks."""
        self._held = functions
        self._called: set[str] = set(_ENTRIES)
        self._waiting: dict[str, list[FunctionType]] = {}
        self._scanned: set[FunctionType] = set()

    def follow(self, classes: Iterable[type]) -> Iterator[tuple[dict[str, Any], str]]:
        """Yields pairs of a dictionary of globals and a name in it, for these classes too."""
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
            if function in self._scanned or _is_of_library(function):
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
    """Returns the functions that a class attribute, or a global, comes to."""
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
    """Returns those of the names that are not of attributes."""
    inner = (_globals_in(c) for c in code.co_consts if isinstance(c, CodeType))
    own = (i.argval for i in dis.get_instructions(code) if i.opname.endswith(("_GLOBAL", "_NAME")))
    return frozenset(own).union(*inner)


def class_dict(cls: type) -> dict[str, Any]:
    """Returns the dictionary that a class's attributes are in, to read its version."""
    return next(d for d in gc.get_referents(cls.__dict__) if type(d) is dict)
