"""watched: a number read from data whose later uses decide what a graph takes for granted of it.

`if t.item() > 0.5` needs one graph per side, not one per value; `x * t.item()` needs none: in the
graph the number is a tensor without dimensions, which takes part in arithmetic as a number does.
Only where plain Python asks for the number itself is the graph right for that number alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

_ARITHMETIC = ("add", "sub", "mul", "truediv")
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


@dataclass(slots=True)
class Uses:
    """What was asked of one number: comparisons with their outcomes, or the number itself."""

    comparisons: list[tuple[Callable[[Any], Any], bool]] = field(default_factory=list)
    exact: bool = False

    def outcomes(self, number: Any) -> Any:
        """The number, or how it compares; None where neither was asked for."""
        if self.exact:
            return number
        return tuple(compare(number) for compare, _ in self.comparisons) or None


class WatchedNumber:
    """A float as a value of the graph (`tensor`, double) and as it was recorded (`number`)."""

    __slots__ = ("_derive", "_tensor", "_uses", "number")
    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self,
        tensor: torch.Tensor,
        number: Any,
        uses: Uses,
        derive: Callable[[Any], Any] = lambda n: n,
    ) -> None:
        self._tensor, self.number, self._uses, self._derive = tensor, number, uses, derive

    def _exactly(self) -> Any:
        self._uses.exact = True
        return self.number

    def __float__(self) -> float:
        return float(self._exactly())

    def __int__(self) -> int:
        return int(self._exactly())

    def __round__(self, digits: int | None = None) -> Any:
        return round(self._exactly(), digits)

    def __bool__(self) -> bool:
        return self._compare(bool)

    def __repr__(self) -> str:
        return repr(self._exactly())

    def __neg__(self) -> Any:
        return self._combine(operator.neg)

    def _compare(self, ask: Callable[[Any], Any]) -> bool:
        outcome, derive = bool(ask(self.number)), self._derive
        self._uses.comparisons.append((lambda n: bool(ask(derive(n))), outcome))
        return outcome

    def _combine(self, apply: Callable[[Any], Any]) -> WatchedNumber:
        derive = self._derive
        return WatchedNumber(
            apply(self._tensor), apply(self.number), self._uses, lambda n: apply(derive(n))
        )

    def _for(self, other: torch.Tensor) -> Any:
        """The tensor where it gives what the number would: not with integers or with doubles."""
        if other.is_floating_point() and other.ndim > 0:
            return self._tensor
        return self._exactly()

    def _with(self, apply: Callable[[Any, Any], Any], other: Any) -> Any:
        if isinstance(other, torch.Tensor):
            return apply(self._for(other), other)
        other = other._exactly() if isinstance(other, WatchedNumber) else other
        return self._combine(lambda n: apply(n, other))


def _arithmetic(name: str) -> Callable[[WatchedNumber, Any], Any]:
    return lambda self, other: self._with(getattr(operator, name), other)


def _reflected(name: str) -> Callable[[WatchedNumber, Any], Any]:
    def apply(number: Any, other: Any) -> Any:
        return getattr(operator, name)(other, number)

    return lambda self, other: self._with(apply, other)


def _comparison(name: str) -> Callable[[WatchedNumber, Any], Any]:
    compare = getattr(operator, name)

    def method(self: WatchedNumber, other: Any) -> Any:
        if isinstance(other, torch.Tensor):
            return compare(self._for(other), other)
        other = other._exactly() if isinstance(other, WatchedNumber) else other
        return self._compare(lambda n: compare(n, other))

    return method


for _name in _ARITHMETIC:
    setattr(WatchedNumber, f"__{_name}__", _arithmetic(_name))
    setattr(WatchedNumber, f"__r{_name}__", _reflected(_name))
for _name in _COMPARISONS:
    setattr(WatchedNumber, f"__{_name}__", _comparison(_name))
