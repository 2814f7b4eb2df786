"""extremes: traces Python's `max` and `min` of tensors as Python computes them."""

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
    """While active, `max` and `min` of tensors without dimensions are ops of the graph.

    Other values are left to Python. torch.export's own replacements return tensors where Python
    returns a number, and refuse a single tensor, whose elements Python compares.
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
            # The first of equal values; comparisons with NaN are false, as in Python.
            is_beyond = _IS_BEYOND[name]
            return reduce(lambda a, b: torch.where(is_beyond(b, a), b, a), values)
        return _BUILTIN[name](*args)

    return extreme


def _are_comparable(values: Any) -> bool:
    """Returns True for tensors without dimensions, of one dtype and device."""
    return all(isinstance(x, torch.Tensor) and x.ndim == 0 for x in values) and (
        len({(x.dtype, x.device) for x in values}) == 1
    )
