"""Writes frozen Python values as texts that are the same in every process.

Objects are named by their classes: the walk over a model's state describes their attributes where
it finds them. Addresses, and integers so large that they may be addresses, are left out.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import re
from collections.abc import Hashable, Iterable
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from pabc.artifact.sources import digest_code
from pabc.passes import FrozenObject, Same, freeze

OBJECT = ("a ", "an ")
"""Starts the text of an object that is not a value: its contents are described elsewhere."""
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_SMALLEST_ADDRESS = 1 << 32
_LONGEST = 200
_VALUES = (range, slice, type(...), np.generic, torch.layout, torch.memory_format)
"""Types, besides those that are frozen by value, whose `repr` says all."""
_WRAPPED = ("__wrapped__", "__func__", "fget", "func")
"""Attributes by which decorators and descriptors of Python hold the function that they are for."""


def text_of(frozen: Hashable) -> str:
    """Returns a value that :func:`pabc.passes.freeze` returned as text."""
    if isinstance(frozen, Same):
        return _text_of_object(frozen.value)
    if isinstance(frozen, FrozenObject):
        return _text_of_instance(frozen.kind, dict(frozen.held).get("_name_"))
    if isinstance(frozen, tuple) and frozen:
        return _text_of_tagged(*frozen)
    return str(frozen)


def text_of_key(key: Hashable) -> str | None:
    """Returns the key of an entry as text, or None for one that differs between processes."""
    if isinstance(key, str):
        return _without_addresses(key)
    text = text_of(freeze(key))
    return None if text.startswith(OBJECT) or "(a " in text else text


def hash_of_values(tensor: torch.Tensor) -> str:
    """Returns a hash of a tensor's values; empty if it has none to read."""
    if tensor.layout != torch.strided or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return ""
    if tensor.device.type == "meta":
        return ""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hash_of_bytes(flat.numpy().tobytes())


def _text_of_tagged(kind: Any, *parts: Any) -> str:
    if kind is FunctionType:
        code, cells, defaults = parts
        return _text_of_function(code, cells, defaults)
    if kind is MethodType:
        function, owner = map(text_of, parts)
        return f"{function} of {owner}"
    if kind is functools.partial:
        return f"partial({', '.join(map(text_of, parts[0]))})"
    if kind is tuple:
        return f"({', '.join(map(text_of, parts[0]))})"
    if kind is frozenset:
        return f"frozenset({', '.join(sorted(map(text_of, parts[0])))})"
    if not isinstance(kind, type):  # a container, which is described elsewhere, or one again
        return str(kind)
    return _text_of_value(parts[0])


def _text_of_value(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= _SMALLEST_ADDRESS:
        return "an int that may be an address"
    text = _without_addresses(repr(value))
    return text if len(text) <= _LONGEST else f"{text[:40]}... ({hash_of_bytes(text.encode())})"


def _text_of_function(code: Any, cells: Iterable[Hashable], defaults: Hashable) -> str:
    """Returns the name and the code of a function, with that of functions that it closes over."""
    inner = [text for text in map(text_of, cells) if text.startswith("def ")]
    parts = (digest_code(code), *inner, text_of(defaults))
    return f"def {code.co_name} ({hash_of_bytes(repr(parts).encode())})"


def _text_of_object(value: Any) -> str:
    """Returns the text of an object that is compared by identity within a process."""
    if isinstance(value, _VALUES):
        return _text_of_value(value)
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)} {value.dtype}"
    if isinstance(value, np.ndarray):
        return f"an array {value.shape} {value.dtype}"
    if isinstance(value, type):
        return f"class {value.__qualname__}"
    if isinstance(value, ModuleType):
        return f"module {value.__name__}"
    if isinstance(value, tuple):
        return f"{type(value).__qualname__}{text_of(freeze(tuple(value)))}"
    for name in _WRAPPED:
        inner = getattr(value, name, None)
        if isinstance(inner, FunctionType):
            return f"{type(value).__qualname__} of {text_of(freeze(inner))}"
    return _text_of_instance(type(value), getattr(value, "_name_", None), value)


def _text_of_instance(kind: type, name: Any, value: Any = None) -> str:
    if issubclass(kind, enum.Enum):
        name = text_of(name) if isinstance(name, tuple) else repr(name)
        return f"{kind.__qualname__}.{name}"
    own = getattr(value, "__qualname__", None)  # a function of C
    return f"a {kind.__qualname__} {own}" if isinstance(own, str) else f"a {kind.__qualname__}"


def _without_addresses(text: str) -> str:
    return _ADDRESS.sub("", text)


def hash_of_bytes(data: bytes) -> str:
    """Returns the first half of a SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]
