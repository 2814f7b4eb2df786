"""A model's arguments as flat leaves, in one order however the call is spelled."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pabc.base.arguments import bind_arguments, check_constants, in_order, sees_spelling
from pabc.base.structure import Structure, flatten

_PLAIN = frozenset((torch.Tensor, int, float, bool, str, type(None)))
"""Types of arguments that hold no others."""


class _ArgumentIndex:
    """Stands for the argument at `index` while it is found out where that goes."""

    def __init__(self, index: int) -> None:
        self.index = index


class Arguments:
    """Flattens the calls of one model.

    All spellings of a call are one, but for a forward that can tell them apart. Where no argument
    is a container, where each one goes follows from how the call is spelled (how many are
    positional, which are named) and is remembered.
    """

    def __init__(self, signature: inspect.Signature, *, as_written: bool = False) -> None:
        """`as_written`: keeps every spelling of a call apart."""
        self._signature = signature
        self._as_written = as_written
        self._known: dict[tuple[int, tuple[str, ...]], tuple[list[Any], Structure]] = {}

    @classmethod
    def of(cls, forward: Callable[..., Any]) -> Arguments:
        """Returns the arguments of a forward."""
        return cls(inspect.signature(forward), as_written=sees_spelling(forward))

    def check(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raises TypeError, as the model itself would, for what its signature does not take."""
        self._signature.bind(*args, **kwargs)

    def bind(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the call in its one spelling, or, for `as_written`, as it is written.

        Raises TypeError as the model itself would, except for calls taken as written: a decorator
        may accept other arguments.
        """
        if self._as_written:
            return tuple(args), in_order(self._signature, kwargs)
        return bind_arguments(self._signature, args, kwargs)

    def flatten(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[list[Any], Structure]:
        """Returns the leaves and the structure of the call that :meth:`bind` returns.

        Raises TypeError for arguments that the model does not take, and for those that can be
        neither inputs of a graph nor constants; see :func:`check_constants`.
        """
        values = (*args, *kwargs.values())
        if not _PLAIN.issuperset(map(type, values)):
            return self._flatten(*self.bind(args, kwargs))
        spelling = len(args), tuple(kwargs)
        if spelling not in self._known:
            self._flatten(*self.bind(args, kwargs))
            indices = map(_ArgumentIndex, range(len(values)))
            positional = [next(indices) for _ in args]
            self._known[spelling] = flatten(
                self.bind(positional, dict(zip(kwargs, indices, strict=True)))
            )
        order, structure = self._known[spelling]
        return [values[x.index] if type(x) is _ArgumentIndex else x for x in order], structure

    def _flatten(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Any], Structure]:
        leaves, structure = flatten((args, kwargs))
        check_constants((args, kwargs), leaves, tuple(self._signature.parameters))
        return leaves, structure


def delete_arguments(
    deleted: Sequence[tuple[Any, ...]], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Deletes from the user's dictionaries the keys that the model's forward deletes.

    Each entry of `deleted` is a path from `(args, kwargs)`: the keys of containers, then the one
    to delete.
    """
    for *path, key in deleted:
        holder: Any = (args, kwargs)
        for step in path:
            holder = holder[step]
        holder.pop(key, None)
