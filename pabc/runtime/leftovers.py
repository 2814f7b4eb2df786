"""Finds what calls of a model leave behind: Python state that a skipped call would not leave."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pabc.base.forward import inner_forward
from pabc.passes import MISSING, Change, Holder, Snapshot, freeze
from pabc.runtime.onlookers import watching_hooks


class Leftovers:
    """The state that calls of one form leave behind, as far as it was found out.

    A call may build tables or set up hooks when it is first made; it must leave nothing the second
    time, but for what hooks keep that only look on. Two calls at most are watched.

    Attributes:
        are_known: whether calls are known to leave nothing, so that they can be skipped.
        are_doubted: whether a call left something, and the next one must tell if it does so, too.
    """

    def __init__(self) -> None:
        self.are_known = False
        self.are_doubted = False
        self._suspects: list[Holder] = []

    @contextmanager
    def watching(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Iterator[None]:
        """Compares the Python state before and after the call within.

        Raises: ValueError, naming what changed, if a second call changes something as well.
        """
        snapshot = Snapshot.of(model, _name_arguments(model, args, kwargs), values="all")
        with watching_hooks(model, self._suspects) as hooks:
            yield
        changes = [change for change in snapshot.changes() if not _is_alike(change)]
        kept = [change for change in changes if not hooks.is_of_onlooker(change)]
        self._suspects = [change.holder for change in kept]
        if not kept:
            self.are_known, self.are_doubted = True, False
        elif self.are_doubted:
            raise ValueError(_describe(model, kept[0]))
        else:
            self.are_doubted = True


def _name_arguments(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the arguments by name, or, where the forward does not tell, by position."""
    names = list(inspect.signature(inner_forward(model)).parameters)
    spare = [str(i) for i in range(len(names), len(args))]
    return dict(zip([*names, *spare], args, strict=False)) | dict(kwargs)


def _is_alike(change: Change) -> bool:
    """Returns whether a value is set to what it was, like a weight that was moved and is back."""
    if change.old is change.new:  # a tensor that was written to
        return False
    return _are_alike(change.old, change.new)


def _are_alike(old: Any, new: Any) -> bool:
    if old is new:
        return True
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        return _are_equal(old, new)
    if type(old) is not type(new):
        return False
    if isinstance(old, dict):
        return list(old) == list(new) and all(_are_alike(old[key], new[key]) for key in old)
    if isinstance(old, (set, frozenset)):
        return bool(old == new)
    if isinstance(old, (list, tuple, deque)):
        return len(old) == len(new) and all(map(_are_alike, old, new))
    return freeze(old) == freeze(new)


def _are_equal(old: torch.Tensor, new: torch.Tensor) -> bool:
    if (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
        return False
    return old.is_meta or torch.equal(old, new)


def _describe(model: nn.Module, change: Change) -> str:
    where = f"{type(model).__name__}: expected calls that leave nothing behind, since"
    what = f"a skipped call would not, found that each one changes {change.name}"
    how = "" if change.old is change.new else f", from {_short(change.old)} to {_short(change.new)}"
    return (
        f"{where} {what}{how}; keep such state outside of the model, turn off what keeps it (a "
        "cache), or use a schedule that reuses nothing"
    )


def _short(value: Any) -> str:
    if value is MISSING:
        return "nothing"
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"
