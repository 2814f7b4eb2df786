"""number_mode: calls PyTorch's functions with the tensors of traced numbers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode

from pabc.base.numbers import is_number

from ..ir import aten, is_call
from .indexing import can_select, select_positions
from .numbers import (
    BINARY,
    COMPARISONS,
    NumberIsReadError,
    TracedNumber,
    plain,
    tensor_of,
    value_of,
)

_ELEMENTWISE = frozenset(
    (
        *(f"__{prefix}{name}__" for name in BINARY[:4] for prefix in ("", "r", "i")),
        *(f"__{name}__" for name in COMPARISONS),
        *("add", "sub", "mul", "div", "true_divide", "add_", "sub_", "mul_", "div_"),
        *COMPARISONS,
    )
)
"""Functions of two operands with the same result for a number and for a tensor that holds it."""


class NumberMode(TorchFunctionMode):
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
                return func(*_replace(args, value_of), **_replace(kwargs, value_of))
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
    elements = [tensor_of(x) if is_number(x) else torch.as_tensor(x) for x in _elements(data)]
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
