"""untouched: undoes what a traced forward leaves behind: tables built lazily would hold fake
tensors."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .python_state import Snapshot, Values, is_library

_FunctionCache = type(functools.lru_cache(lambda: None))


@contextmanager
def untouched(model: nn.Module, *, values: Values = "unregistered") -> Iterator[None]:
    """Restores the model's Python state (:class:`Snapshot`), and empties function caches that were
    used. `values`: whose values are restored as well; of buffers, where the model really runs."""
    snapshot = Snapshot.of(model, values=values)
    caches = [(cache, cache.cache_info()) for cache in _function_caches()]
    try:
        yield
    finally:
        snapshot.restore()
        for cache, before in caches:
            if cache.cache_info() != before:
                cache.cache_clear()


def _function_caches() -> list[Any]:
    """Functions under `functools.lru_cache`, but for those of Python and of PyTorch itself.

    Found as what refers to their type. Not among `gc.get_objects()`: to hold all objects, even for
    a moment, breaks every `tuple(...)` that another thread is about to build from an iterator.
    """
    caches = [c for c in gc.get_referrers(_FunctionCache) if type(c) is _FunctionCache]
    return [c for c in caches if not is_library(c.__module__)]
