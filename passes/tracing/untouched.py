"""Undoing what a traced forward leaves behind: tables built lazily would hold fake tensors."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

_FunctionCache = type(functools.lru_cache(lambda: None))
_LIBRARIES = {"torch", "sympy", "mpmath", *sys.stdlib_module_names}


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restores what the model's modules hold, and empties function caches that were used."""
    seen: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        _remember(module, seen)
    caches = [(cache, cache.cache_info()) for cache in _function_caches()]
    try:
        yield
    finally:
        for holder, contents in seen.values():
            _restore(holder, contents)
        for cache, before in caches:
            if cache.cache_info() != before:
                cache.cache_clear()


def _function_caches() -> list[Any]:
    """Functions under `functools.lru_cache`, but for those of Python and of PyTorch itself.

    Found as what refers to their type. Not among `gc.get_objects()`: to hold all objects, even for
    a moment, breaks every `tuple(...)` that another thread is about to build from an iterator.
    """
    caches = [c for c in gc.get_referrers(_FunctionCache) if type(c) is _FunctionCache]
    return [c for c in caches if str(c.__module__).partition(".")[0] not in _LIBRARIES]


def _remember(value: Any, seen: dict[int, tuple[Any, Any]]) -> None:
    """Notes what mutable containers and plain objects hold, and what they hold in turn."""
    if id(value) in seen or isinstance(value, (torch.Tensor, type, ModuleType, FunctionType)):
        return
    if isinstance(value, dict):
        contents: Any = dict(value)
        inner = list(value.values())
    elif isinstance(value, (list, set)):
        contents = inner = list(value)
    elif isinstance(value, tuple):
        contents, inner = None, list(value)
    elif isinstance(getattr(value, "__dict__", None), dict):
        contents, inner = None, [value.__dict__]
    else:
        return
    seen[id(value)] = (value, contents)
    for item in inner:
        _remember(item, seen)


def _restore(holder: Any, contents: Any) -> None:
    """Puts a container back, where it has changed: some refuse to be written to."""
    if isinstance(holder, dict):
        if len(holder) != len(contents) or any(
            key not in holder or holder[key] is not value for key, value in contents.items()
        ):
            holder.clear()
            holder.update(contents)
    elif isinstance(holder, set):
        if holder != set(contents):
            holder.clear()
            holder.update(contents)
    elif isinstance(holder, list):
        holder[:] = contents
