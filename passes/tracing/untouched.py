"""untouched: undoes what a traced forward leaves behind: tables built lazily would hold fake
tensors."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from .python_state import SavedWrites, Snapshot, is_library

_FunctionCache = type(functools.lru_cache(lambda: None))


@contextmanager
def untouched(model: nn.Module, *, runs: bool = False) -> Iterator[None]:
    """Restores the model's Python state (:class:`Snapshot`), and empties function caches that were
    used. `runs`: the model really runs, so that it may write to its tensors: they are restored."""
    snapshot = Snapshot.of(model, values="none" if runs else "unregistered")
    saved = SavedWrites(snapshot.tensors(registered=True)) if runs else None
    caches = [(cache, cache.cache_info()) for cache in _function_caches()]
    try:
        with saved or nullcontext():
            yield
    finally:
        snapshot.restore()
        if saved is not None:
            saved.restore()
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
