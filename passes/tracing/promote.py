"""promote: a Python number that stays one for the model, and is a tensor for the graph.

A model that is called with a new timestep at every step, as a Python float or int, would be
captured anew at every step. Instead it is traced with a number that remembers the graph input it
stands for: `isinstance(t, float)` holds and `torch.is_tensor(t)` does not, as in the user's call,
but arithmetic on it and PyTorch functions that take it are recorded with the input. Where Python
needs its value (a comparison, a size, `int(t)`), it cannot be promoted, and tracing stops.

What cannot be seen (`math.cos(t)` reads the value behind its back) is for the caller to find, by
comparing the graph with the model at two values (:mod:`pabc.promotion` does).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from numbers import Integral, Real
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode

from ..ir import aten, is_call


class NumberIsReadError(ValueError):
    """A promoted number's value is needed while tracing."""


def is_number(leaf: Any) -> bool:
    """Whether an argument is a Python (or NumPy) number; flags are not."""
    return isinstance(leaf, Real) and not isinstance(leaf, bool)


def as_tensor(number: Any) -> torch.Tensor:
    """The graph input for a number: without dimensions, as precise as Python's own."""
    if isinstance(number, Integral):
        return torch.tensor(int(number), dtype=torch.int64)
    return torch.tensor(float(number), dtype=torch.float64)


def traced(number: Any, tensor: torch.Tensor) -> TracedFloat | TracedInt:
    """`number`, remembering that `tensor` holds its value."""
    result = TracedInt(number) if isinstance(number, Integral) else TracedFloat(number)
    result.tensor = tensor
    return result


def _read(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any) -> Any:
        if args and not isinstance(args[0], Real):
            return NotImplemented  # None, say, or a tensor, which decides itself
        raise NumberIsReadError(f"__{name}__ needs the value of a number")

    return method


def _compute(name: str, *, swapped: bool = False) -> Callable[..., Any]:
    """An arithmetic method: Python's own result, and the same from the tensors, in its precision.

    With anything but a number the other operand decides, as it does for Python's own numbers.
    """
    function = getattr(operator, name)

    def method(self: Any, *others: Any) -> Any:
        if not all(isinstance(other, Real) for other in others):
            return NotImplemented
        operands = [self, *others] if not swapped else [*others, self]
        result = function(*map(_plain, operands))
        if not isinstance(result, (int, float)):
            return NotImplemented
        dtype = torch.int64 if isinstance(result, int) else torch.float64
        tensors = [_tensor_of(operand).to(dtype) for operand in operands]
        return traced(result, function(*tensors))

    return method


def _plain(number: Any) -> int | float:
    """The value alone; the traced classes' own conversions are refused."""
    if isinstance(number, TracedInt):
        return int.__int__(number)
    if isinstance(number, TracedFloat):
        return float.__float__(number)
    return int(number) if isinstance(number, Integral) else float(number)


def _tensor_of(number: Any) -> torch.Tensor:
    return number.tensor if isinstance(number, (TracedFloat, TracedInt)) else as_tensor(number)


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_METHODS: dict[str, Any] = {
    **{f"__{name}__": _compute(name) for name in (*_BINARY, "neg", "pos", "abs")},
    **{f"__r{name}__": _compute(name, swapped=True) for name in _BINARY},
    **{
        f"__{name}__": _read(name)
        for name in ("lt", "le", "gt", "ge", "eq", "ne", "hash", "bool", "int", "float", "index")
    },
    **{f"__{name}__": _read(name) for name in ("round", "trunc", "floor", "ceil", "divmod")},
}


class TracedFloat(type("_Float", (float,), _METHODS)):  # type: ignore[misc]
    """A float that is a graph input."""

    tensor: torch.Tensor


class TracedInt(type("_Int", (int,), _METHODS)):  # type: ignore[misc]
    """An int that is a graph input."""

    tensor: torch.Tensor


class RecordNumbers(TorchFunctionMode):
    """While active, PyTorch functions that are given traced numbers get their tensors instead."""

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
            constant = func(*_replace(args, _plain), **_replace(kwargs, _plain))
            return constant.fill_(number.tensor)
        if func is torch.Tensor.__getitem__:
            raise NumberIsReadError("an index needs the value of a number")
        return _call(func, args, kwargs)


_FROM_DATA: tuple[Any, ...] = (
    torch.tensor,
    torch.as_tensor,
    torch.asarray,
    torch.scalar_tensor,
    torch.Tensor.new_tensor,
)
_FILLING = (torch.full, torch.full_like, torch.Tensor.new_full)


def _from_data(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """A tensor built from (lists of) numbers: as PyTorch would, its elements then the inputs."""
    constant: torch.Tensor = func(*_replace(args, _plain), **_replace(kwargs, _plain))
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
    """Calls with tensors in place of numbers, promoted as numbers are.

    A number takes part in type promotion as PyTorch's default dtype and below any tensor; a tensor
    without dimensions does so only beside one with dimensions, of its own category.
    """
    operands = [x for x in _flat((args, kwargs)) if isinstance(x, torch.Tensor)]

    def substitute(number: Any) -> torch.Tensor:
        tensor: torch.Tensor = number.tensor
        for operand in operands:
            wanted = torch.result_type(operand, _plain(number))
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


def _numbers_in(value: Any) -> Iterator[TracedFloat | TracedInt]:
    return (x for x in _flat(value) if isinstance(x, (TracedFloat, TracedInt)))


def _replace(value: Any, function: Callable[[Any], Any]) -> Any:
    """`value` with every traced number in it replaced."""
    if isinstance(value, (TracedFloat, TracedInt)):
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

    `read`: per value read from data, the inputs that it follows from.
    """
    for node in graph.nodes:
        if is_call(node, (aten.item.default, aten._local_scalar_dense.default)):
            source: Node = node.args[0]
            raise NumberIsReadError(f"{node.name} needs the value of {source.name}")
    if found := {name for inputs in read for name in inputs if name in names}:
        raise NumberIsReadError(f"values are read that follow from {sorted(found)}")


def check_is_plain(leaf: Any) -> None:
    """Raises :class:`NumberIsReadError` for a traced number where its value would be kept."""
    if isinstance(leaf, (TracedFloat, TracedInt)):
        raise NumberIsReadError("a result needs the value of a number")
