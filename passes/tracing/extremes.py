"""extremes: Python's `max` and `min` of tensors while a model is traced."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch

_SYMBOLIC = (torch.SymInt, torch.SymFloat)
_BUILTIN = {"max": builtins.max, "min": builtins.min}
_IS_BEYOND = {"max": torch.gt, "min": torch.lt}


@contextmanager
def exact_extremes() -> Iterator[None]:
    """Makes `max` and `min` of tensors without dimensions an op of the graph, and leaves all else
    to Python.

    torch.export replaces both by functions that give tensors where Python gives a number, and do
    not take what Python takes: one tensor, whose elements are compared.
    """
    before = {name: getattr(builtins, name) for name in _BUILTIN}
    for name in _BUILTIN:
        setattr(builtins, name, _extreme(name, before[name]))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(builtins, name, function)


def _extreme(name: str, of_symbols: Callable[..., Any]) -> Callable[..., Any]:
    def extreme(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            return _BUILTIN[name](*args, **kwargs)
        if len(args) == 1 and not isinstance(args[0], (list, tuple, set, dict)):
            args = ([*args[0]],)
        values = args[0] if len(args) == 1 else args
        if any(isinstance(value, _SYMBOLIC) for value in values):
            return of_symbols(*args)
        if _are_comparable(values):
            # Of equal values the first one; a NaN is beyond nothing, and nothing is beyond it.
            is_beyond = _IS_BEYOND[name]
            return reduce(lambda a, b: torch.where(is_beyond(b, a), b, a), values)
        return _BUILTIN[name](*args)

    return extreme


def _are_comparable(values: Any) -> bool:
    """Whether these are tensors of one element and one kind."""
    return all(isinstance(x, torch.Tensor) and x.ndim == 0 for x in values) and (
        len({(x.dtype, x.device) for x in values}) == 1
    )
