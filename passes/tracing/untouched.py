"""untouched: undoes the side effects of a traced forward, such as lazily built tables of fake
tensors."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from pabc.internals.dispatch import TorchDispatchMode
from pabc.internals.ops import OpOverload, schema_of

from .frozen import is_library
from .python_state import Snapshot

_FunctionCache = type(functools.lru_cache(lambda: None))


@contextmanager
def untouched(model: nn.Module, *, runs: bool = False) -> Iterator[None]:
    """Restores the model's Python state (:class:`Snapshot`) on exit, and clears the function caches
    that were used. With `runs`, where the model really runs, its tensors are restored too."""
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
    """Returns the functions under `functools.lru_cache`, except Python's and PyTorch's own.

    They are found as referrers of their type. To go through `gc.get_objects()` would hold all
    objects for a moment, which breaks a `tuple(...)` that another thread builds from an iterator.
    """
    caches = [c for c in gc.get_referrers(_FunctionCache) if type(c) is _FunctionCache]
    return [c for c in caches if not is_library(c.__module__)]


class SavedWrites(TorchDispatchMode):
    """While active, saves the values of given tensors before they are first written to."""

    supports_higher_order_operators = True

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._memory = {s.data_ptr(): s for s in map(_storage, tensors) if s is not None}
        self._saved: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, OpOverload) and schema_of(func).is_mutable:
            for i, argument in enumerate(schema_of(func).arguments):
                given = args[i] if i < len(args) else kwargs.get(argument.name)
                if argument.is_write and isinstance(given, torch.Tensor):
                    self._save(_storage(given))
        return func(*args, **kwargs)

    def _save(self, storage: torch.UntypedStorage | None) -> None:
        address = None if storage is None else storage.data_ptr()
        if address in self._memory and address not in self._saved:
            self._saved[address] = self._memory[address].clone()

    def restore(self) -> None:
        """Restores the values of the tensors."""
        for address, values in self._saved.items():
            self._memory[address].copy_(values)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """Returns the memory of a tensor, or None if it is made of other tensors."""
    try:
        return tensor.untyped_storage() if tensor.device.type != "meta" else None
    except (NotImplementedError, RuntimeError):
        return None
