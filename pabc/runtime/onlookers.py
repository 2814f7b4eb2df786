"""Tells hooks that look on, and may keep what they see, from those that take part in a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pabc.internals import pytree
from pabc.internals.modules import forward_hooks, forward_pre_hooks
from pabc.internals.tensors import version_of
from pabc.passes import MISSING, Change, Holder

_Entry = tuple[int, Any]
"""The identity of what a holder holds, and a key in it."""


class HookWatch:
    """Watches the hooks of modules, as they are called, for what they leave in some holders."""

    def __init__(self, holders: Sequence[Holder]) -> None:
        self._holders = {id(holder.value): holder for holder in holders}
        self._by_onlookers: set[_Entry] = set()
        self._by_others: set[_Entry] = set()

    def is_of_onlooker(self, change: Change) -> bool:
        """Returns whether a change was made by hooks that look on alone: they return nothing, and
        write to nothing that they are given."""
        entry = id(change.holder.value), change.key
        return entry in self._by_onlookers and entry not in self._by_others

    def around(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the hook, watched."""

        def watched(module: nn.Module, *given: Any) -> Any:
            contents, versions = self._read(), _versions(given)
            result = hook(module, *given)
            looks_on = result is None and _versions(given) == versions
            written = self._by_onlookers if looks_on else self._by_others
            for holder, now in self._read().items():
                old = contents[holder]
                written.update(
                    (holder, key)
                    for key in {**old, **now}
                    if old.get(key, MISSING) is not now.get(key, MISSING)
                )
            return result

        return watched

    def _read(self) -> dict[int, dict[Any, Any]]:
        return {identity: holder.read() for identity, holder in self._holders.items()}


@contextmanager
def watching_hooks(model: nn.Module, holders: Sequence[Holder]) -> Iterator[HookWatch]:
    """Watches the hooks of a model's modules within the context, if there are holders to watch."""
    watch, replaced = HookWatch(holders), []
    registers = [r for m in model.modules() for r in (forward_pre_hooks(m), forward_hooks(m))]
    for register in registers if holders else ():
        for key, hook in register.items():
            replaced.append((register, key, hook))
            register[key] = watch.around(hook)
    try:
        yield watch
    finally:
        for register, key, hook in replaced:
            register[key] = hook


def _versions(given: Any) -> list[int]:
    leaves = pytree.tree_leaves(given)
    tensors = [x for x in leaves if isinstance(x, torch.Tensor) and not x.is_inference()]
    return [version_of(tensor) for tensor in tensors]
