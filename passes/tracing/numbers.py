"""numbers: traces Python numbers as tensors of the graph.

A model that is called with a new timestep at every step, as a Python float or int, or that reads
one with `t.item()`, would be recaptured at every step. Instead it is traced with a number that
knows its tensor: `isinstance(t, float)` is True and `torch.is_tensor(t)` is False, as in the user's
call, but arithmetic on it, and PyTorch functions that take it, are recorded with the tensor. Where
Python needs the value (a comparison, a size, `int(t)`), a policy decides: a number among the
arguments stops the trace, and becomes a constant; for a number read from data, the graph is
specialized on the outcome of the comparison, or on the value.

The class is no subclass of float: C code (`math.cos`, NumPy) would read the value unseen.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch

from pabc.base.numbers import as_tensor


class NumberIsReadError(ValueError):
    """Raised when the value of a lifted scalar is needed while tracing."""


class TracedNumber:
    """A Python number, and the tensor without dimensions that is its value in the graph."""

    __slots__ = ("_plain", "policy", "tensor")

    def __init__(self, plain: int | float, tensor: torch.Tensor, policy: Policy) -> None:
        self._plain, self.tensor, self.policy = plain, tensor, policy

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class that `isinstance` sees."""
        return type(self._plain)

    def __getattr__(self, name: str) -> Any:
        if not hasattr(type(self._plain), name):
            raise AttributeError(f"{type(self._plain).__name__!r} has no attribute {name!r}")
        return getattr(self.policy.value(self), name)

    @classmethod
    def __torch_function__(cls, *_: Any) -> Any:
        """Lets PyTorch's functions take it, so that :class:`NumberMode` sees them."""
        return NotImplemented


class Policy:
    """Decides what happens where Python needs a number's value; this one refuses."""

    records = False
    """True if functions that may treat a tensor differently get the value instead."""

    def value(self, number: TracedNumber) -> Any:
        """Returns the number, or raises."""
        raise NumberIsReadError("the value of a number is needed")

    def compare(self, number: TracedNumber, ask: Callable[[Any], bool]) -> bool:
        """Returns `ask` of the number."""
        return ask(self.value(number))


def lift(number: Any, tensor: torch.Tensor) -> TracedNumber:
    """`number`, as an input of the graph that `tensor` holds."""
    return TracedNumber(plain(number), tensor, Policy())


def plain(number: Any) -> int | float:
    """Returns the value, past the policy."""
    if isinstance(number, TracedNumber):
        return number._plain
    return int(number) if isinstance(number, Integral) else float(number)


def value_of(number: Any) -> Any:
    """Returns a number, for a traced one what its policy says."""
    return number.policy.value(number) if isinstance(number, TracedNumber) else number


def tensor_of(number: Any) -> torch.Tensor:
    """Returns the tensor that a number is in the graph."""
    return number.tensor if isinstance(number, TracedNumber) else as_tensor(number)


def _read(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args: function(value_of(self), *map(value_of, args))


@dataclass(frozen=True, slots=True)
class Comparison:
    """A comparison with another number; `name` is that of the operator."""

    name: str
    other: Any

    def __call__(self, number: Any) -> bool:
        """Returns the outcome for a number."""
        return bool(getattr(operator, self.name)(number, self.other))


def _compare(name: str) -> Callable[..., Any]:
    def method(self: TracedNumber, other: Any) -> Any:
        if not isinstance(other, Real):
            return NotImplemented  # None, say, or a tensor, which decides itself
        return self.policy.compare(self, Comparison(name, value_of(other)))

    return method


def _compute(name: str, *, swapped: bool = False) -> Callable[..., Any]:
    """Returns an arithmetic method, which computes with numbers and tensors in the same precision.

    Operands that are no numbers decide themselves, as with Python's own numbers.
    """
    function = getattr(operator, name)

    def method(self: TracedNumber, *others: Any) -> Any:
        if not all(isinstance(other, Real) for other in others):
            return NotImplemented
        operands = [self, *others] if not swapped else [*others, self]
        result = function(*map(plain, operands))
        if not isinstance(result, (int, float)):
            return NotImplemented
        dtype = torch.int64 if isinstance(result, int) else torch.float64
        tensors = [tensor_of(operand).to(dtype) for operand in operands]
        return TracedNumber(result, function(*tensors), self.policy)

    return method


BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_READS: dict[str, Callable[..., Any]] = {
    **{f.__name__: f for f in (hash, int, float, round, divmod, repr, format)},
    **{name: getattr(math, name) for name in ("trunc", "floor", "ceil")},
    "index": operator.index,
    "rdivmod": lambda number, other: divmod(other, number),
}
for _name in BINARY:
    setattr(TracedNumber, f"__{_name}__", _compute(_name))
    setattr(TracedNumber, f"__r{_name}__", _compute(_name, swapped=True))
for _name in ("neg", "pos", "abs"):
    setattr(TracedNumber, f"__{_name}__", _compute(_name))
for _name in COMPARISONS:
    setattr(TracedNumber, f"__{_name}__", _compare(_name))
for _name, _function in _READS.items():
    setattr(TracedNumber, f"__{_name}__", _read(_function))
TracedNumber.__bool__ = lambda self: self.policy.compare(self, bool)  # type: ignore[attr-defined]


def plain_result(leaf: Any) -> Any:
    """Returns a leaf of the model's result, for a traced number its value."""
    return value_of(leaf)
