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
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode

from pabc.base.numbers import as_tensor, is_number

from ..ir import aten, is_call
from .indexing import can_select, select_positions


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
        """Lets PyTorch's functions take it, so that :class:`RecordNumbers` sees them."""
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


def _value(number: Any) -> Any:
    return number.policy.value(number) if isinstance(number, TracedNumber) else number


def _tensor_of(number: Any) -> torch.Tensor:
    return number.tensor if isinstance(number, TracedNumber) else as_tensor(number)


def _read(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args: function(_value(self), *map(_value, args))


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
        return self.policy.compare(self, Comparison(name, _value(other)))

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
        tensors = [_tensor_of(operand).to(dtype) for operand in operands]
        return TracedNumber(result, function(*tensors), self.policy)

    return method


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_READS: dict[str, Callable[..., Any]] = {
    **{f.__name__: f for f in (hash, int, float, round, divmod, repr, format)},
    **{name: getattr(math, name) for name in ("trunc", "floor", "ceil")},
    "index": operator.index,
    "rdivmod": lambda number, other: divmod(other, number),
}
for _name in _BINARY:
    setattr(TracedNumber, f"__{_name}__", _compute(_name))
    setattr(TracedNumber, f"__r{_name}__", _compute(_name, swapped=True))
for _name in ("neg", "pos", "abs"):
    setattr(TracedNumber, f"__{_name}__", _compute(_name))
for _name in _COMPARISONS:
    setattr(TracedNumber, f"__{_name}__", _compare(_name))
for _name, _function in _READS.items():
    setattr(TracedNumber, f"__{_name}__", _read(_function))
TracedNumber.__bool__ = lambda self: self.policy.compare(self, bool)  # type: ignore[attr-defined]

_ELEMENTWISE = frozenset(
    (
        *(f"__{prefix}{name}__" for name in _BINARY[:4] for prefix in ("", "r", "i")),
        *(f"__{name}__" for name in _COMPARISONS),
        *("add", "sub", "mul", "div", "true_divide", "add_", "sub_", "mul_", "div_"),
        *_COMPARISONS,
    )
)
"""Functions of two operands with the same result for a number and for a tensor that holds it."""


class RecordNumbers(TorchFunctionMode):
    """While active, PyTorch functions get the tensors of traced numbers."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        numbers = list(_numbers_in((args, kwargs)))
        if not numbers:
            return func(*args, **kwargs)
        if func in _FROM_DATA:
            return _from_data(func, args, kwargs)
        if func in _FILLING:
            (number,) = [x for x in (*args, *kwargs.values()) if x is numbers[0]]  # not a size
            constant = func(*_replace(args, plain), **_replace(kwargs, plain))
            return constant.fill_(number.tensor)
        if func is torch.Tensor.__getitem__:
            index = _with_tensors(args[1])
            if can_select(args[0], index):
                source, rest = select_positions(args[0], index)
                return source[rest] if rest else source
        if all(number.policy.records for number in numbers):
            if not _is_elementwise(func, args, kwargs):
                return func(*_replace(args, _value), **_replace(kwargs, _value))
        elif func is torch.Tensor.__getitem__:
            raise NumberIsReadError("an index needs the value of a number")
        return _call(func, args, kwargs)


def _with_tensors(index: Any) -> Any:
    """Returns an index with the tensors of traced numbers."""
    items = index if isinstance(index, tuple) else (index,)
    return tuple(item.tensor if isinstance(item, TracedNumber) else item for item in items)


def _is_elementwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Returns True if a tensor can take the number's place without a change of type."""
    if getattr(func, "__name__", "") not in _ELEMENTWISE or len(args) != 2 or kwargs:
        return False
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    return len(tensors) == 1 and tensors[0].is_floating_point() and tensors[0].ndim > 0


_FROM_DATA: tuple[Any, ...] = (
    torch.tensor,
    torch.as_tensor,
    torch.asarray,
    torch.scalar_tensor,
    torch.Tensor.new_tensor,
)
_FILLING = (torch.full, torch.full_like, torch.Tensor.new_full)


def _from_data(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Returns what PyTorch builds from (lists of) numbers, built from their tensors."""
    constant: torch.Tensor = func(*_replace(args, plain), **_replace(kwargs, plain))
    data = args[1] if func is torch.Tensor.new_tensor else (*args, *kwargs.values())[0]
    elements = [_tensor_of(x) if is_number(x) else torch.as_tensor(x) for x in _elements(data)]
    cast = [x.to(device=constant.device, dtype=constant.dtype) for x in elements]
    return torch.stack(cast).reshape(constant.shape)


def _elements(data: Any) -> Iterator[Any]:
    if isinstance(data, (list, tuple)):
        for item in data:
            yield from _elements(item)
    else:
        yield data


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls a function with tensors in place of numbers, under the type promotion of numbers.

    A number counts as PyTorch's default dtype, below any tensor; a tensor without dimensions counts
    as its own dtype, below tensors with dimensions only.
    """
    operands = [x for x in _flat((args, kwargs)) if isinstance(x, torch.Tensor)]

    def substitute(number: Any) -> torch.Tensor:
        tensor: torch.Tensor = number.tensor
        for operand in operands:
            wanted = torch.result_type(operand, plain(number))
            if torch.result_type(operand, tensor) != wanted:
                tensor = tensor.to(wanted)
        return tensor

    return func(*_replace(args, substitute), **_replace(kwargs, substitute))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))
    elif isinstance(value, slice):
        yield from _flat([value.start, value.stop, value.step])
    else:
        yield value


def _numbers_in(value: Any) -> Iterator[TracedNumber]:
    return (x for x in _flat(value) if isinstance(x, TracedNumber))


def _replace(value: Any, function: Callable[[Any], Any]) -> Any:
    """Returns `value` with `function` of every traced number in it."""
    if isinstance(value, TracedNumber):
        return function(value)
    if type(value) in (list, tuple):
        return type(value)(_replace(item, function) for item in value)
    if type(value) is dict:
        return {key: _replace(item, function) for key, item in value.items()}
    return value


def check_numbers_stay_tensors(
    graph: Graph, names: Collection[str], read: Iterable[Collection[str]]
) -> None:
    """Raises :class:`NumberIsReadError` if a graph needs the values of the inputs `names`.

    `read` has, per value read from data, the inputs that it follows from.
    """
    for node in graph.nodes:
        if is_call(node, (aten.item.default, aten._local_scalar_dense.default)):
            source: Node = node.args[0]
            raise NumberIsReadError(f"{node.name} needs the value of {source.name}")
    if found := {name for inputs in read for name in inputs if name in names}:
        raise NumberIsReadError(f"values are read that follow from {sorted(found)}")


def plain_result(leaf: Any) -> Any:
    """Returns a leaf of the model's result, for a traced number its value."""
    return _value(leaf)
