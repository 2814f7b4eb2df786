"""reads: records the Python values that a forward reads from tensor data, and replays them.

Text lengths by `mask.sum(1).tolist()`, `int(positions.max())`, a branch on `torch.any(mask)`, sizes
that follow from data (`x[mask]`, `nonzero`): a graph is specialized on the values it was traced
with. The model is run once to record them, the trace replays them, and every tensor they were read
from becomes a result of the trace, so that a later call can be checked
(:mod:`pabc.passes.tracing.guards`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode

from pabc.internals import pytree
from pabc.internals.dispatch import TorchDispatchMode

from ..ir import MASKS, aten
from .call_sites import CallSites
from .indexing import call_with_known_sizes, can_select, select_positions, with_numbers
from .numbers import Policy, TracedNumber, plain
from .records import (
    CallAgain,
    Checked,
    MaskCount,
    Measure,
    NumberAnswer,
    Read,
    RepeatCount,
    ShapesAgain,
    tensors_in,
)
from .tensor_call import TensorCall

_UNSEEN = (torch.Tensor.numpy, torch.Tensor.__array__)
"""Functions that read memory without a dispatched op."""
_INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
_REPEATS = (torch.repeat_interleave, torch.Tensor.repeat_interleave)
_MASKING = (aten.index.Tensor, aten._unsafe_index.Tensor)
_SEARCHES = frozenset(
    getattr(room, name)
    for room in (torch, torch.Tensor)
    for name in ("argmax", "argmin", "nonzero", "where", "searchsorted", "bucketize")
    if hasattr(room, name)
)
"""Functions whose integer results are positions."""
_POSITIONS = (torch.int64, torch.int32)
_FROM_DATA = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class _NoteNumbers(Policy):
    """Records what Python asks of a number read from data: a comparison, or its value."""

    records = True

    def __init__(self, read: Read, checked: list[Checked]) -> None:
        self._read, self._checked = read, checked
        self._known: list[torch.Tensor] = []

    def value(self, number: TracedNumber) -> Any:
        if any(tensor is number.tensor for tensor in self._known):
            return plain(number)
        self._known.append(number.tensor)
        return self._note(number, NumberAnswer(None))

    def compare(self, number: TracedNumber, ask: Callable[[Any], bool]) -> bool:
        (outcome,) = self._note(number, NumberAnswer(ask))
        return bool(outcome)

    def _note(self, number: TracedNumber, asked: NumberAnswer) -> Any:
        answer = asked.answer(plain(number))
        read = replace(self._read, value=answer, compared=asked.ask is not None)
        self._checked.append(Checked(read, asked, (number.tensor,)))
        return answer


class _DataReadMode(TorchDispatchMode):
    """Sets `seen` when an op's result, or its size, is read from data."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _MASKING:  # tagged, but most indices are positions
            indices = [i for i in args[1] if i is not None]
            self.seen = self.seen or any(i.dtype in MASKS for i in indices)
        elif _FROM_DATA & set(getattr(func, "tags", ())):
            self.seen = True
        return func(*args, **(kwargs or {}))


class ReadRecorder(TorchFunctionMode):
    """While active, records each value that is read from data, in order, in `reads`."""

    def __init__(self, model: nn.Module, *, watch: bool) -> None:
        """With `watch`, positions that tensors give are looked up in the graph, and not read."""
        super().__init__()
        self.reads: list[Read] = []
        self._watch = watch
        self._frames = CallSites(model)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.tolist:
            with self:
                return _to_list(args[0])
        if func in _INDEXING:
            if self._watch and func is torch.Tensor.__getitem__ and can_select(*args):
                args = select_positions(args[0], args[1])
                if not args[1]:
                    return args[0]
            with self:
                args = (args[0], with_numbers(args[1], torch.Tensor.item), *args[2:])
        with _DataReadMode() as watch:
            result = func(*args, **kwargs)
        if result is not None and (watch.seen or func in _UNSEEN):
            shapes = tuple(tuple(tensor.shape) for tensor in tensors_in(result))
            site, path = self._frames.site(), self._frames.path()
            if shapes:
                givers, measure = _size_source(func, args, kwargs)
                self.reads.append(Read(func, site, path, measure(givers), shapes))
            else:
                self.reads.append(Read(func, site, path, result))
        return result


def _size_source(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[torch.Tensor, ...], Measure]:
    """Returns the tensors that a result's size follows from, and how to measure them again."""
    call, tensors = TensorCall.of(args, kwargs)
    masks = tuple(tensor for tensor in tensors if tensor.dtype in MASKS)
    if masks:
        return masks, MaskCount()
    if func in _REPEATS:
        return tensors[-1:], RepeatCount()
    return tensors, ShapesAgain(func, call)


def _may_read(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Returns True if this call of a function reads from data, as not all calls of it do."""
    if func is torch.Tensor.__getitem__:
        plain = (int, slice, type(None), type(Ellipsis))
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return not all(
            item.dtype not in MASKS if isinstance(item, torch.Tensor) else isinstance(item, plain)
            for item in index
        )
    if func is torch.where:
        return len(args) + len(kwargs) == 1
    return func not in _REPEATS or not isinstance(kwargs.get("repeats", args[-1]), int)


def _to_list(tensor: torch.Tensor) -> Any:
    """Returns `tensor.tolist()`, read element by element, as fake tensors do."""
    if tensor.dim() == 0:
        return tensor.item()
    return [_to_list(part) for part in tensor.unbind(0)]


class ReadReplayer(TorchFunctionMode):
    """While active, replays recorded values instead of reading; `checked` gains the tensors."""

    def __init__(self, model: nn.Module, reads: Iterable[Read], *, watch: bool) -> None:
        """With `watch`, floats of `Tensor.item`, and positions that were searched for, are values
        of the graph where possible."""
        super().__init__()
        self.checked: list[Checked] = []
        self.watches = False
        self._watch = watch
        self._places: dict[int, torch.Tensor] = {}
        """Tensors of positions that were searched for, or computed from such."""
        self._coming = deque(reads)
        self._num_reads = len(self._coming)
        self._functions = {read.function for read in self._coming}
        self._frames = CallSites(model)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = self._call(func, args, kwargs or {})
        if self._watch and (func in _SEARCHES or self._places):
            self._note_places(func, (args, kwargs), result)
        return result

    def _note_places(self, func: Any, arguments: Any, result: Any) -> None:
        if func in _SEARCHES or any(id(t) in self._places for t in tensors_in(arguments)):
            for tensor in tensors_in(result):
                if tensor.dtype in _POSITIONS:
                    self._places[id(tensor)] = tensor

    def _call(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        if func in _INDEXING:
            if self._watch and func is torch.Tensor.__getitem__ and can_select(*args):
                self.watches = True
                args = select_positions(args[0], args[1])
                if not args[1]:
                    return args[0]
            with self:
                args = (args[0], with_numbers(args[1], torch.Tensor.item), *args[2:])
        read = (
            self._next(func) if func in self._functions and _may_read(func, args, kwargs) else None
        )
        if read is None:
            return func(*args, **kwargs)
        if read.shapes is not None:
            givers, measure = _size_source(func, args, kwargs)
            result = call_with_known_sizes(func, args, kwargs, read.shapes, read.value)
            if result is not None:
                self.checked.append(Checked(read, measure, givers))
                return result
            result = func(*args, **kwargs)
            if not any(free_unbacked_symbols(tensor.shape) for tensor in tensors_in(result)):
                return result
            self.checked.append(Checked(read, measure, givers))
            return _fix_sizes(result, read.shapes)
        call, tensors = TensorCall.of(args, kwargs)
        again = CallAgain(read.function, call)
        if func is not torch.Tensor.item or not self._can_watch(read.value, tensors[0]):
            self.checked.append(Checked(read, again, tensors))
            return read.value
        self.watches = True
        dtype = torch.double if type(read.value) is float else torch.int64
        tensor = tensors[0].reshape(()).to(dtype, copy=True)  # it may be written to later
        return TracedNumber(read.value, tensor, _NoteNumbers(read, self.checked))

    def skip(self, num_reads: int, num_checked: int) -> None:
        """Continues as if so many values had been read, of which so many are checked."""
        while len(self._coming) > self._num_reads - num_reads:
            self._coming.popleft()
        del self.checked[num_checked:]

    def _can_watch(self, value: Any, source: torch.Tensor) -> bool:
        """Returns True for a float or a position, which can be a value of the graph; other integers
        are usually sizes."""
        is_place = type(value) is int and id(source) in self._places
        return self._watch and (type(value) is float or is_place)

    def _next(self, func: Any) -> Read | None:
        """Returns the record of this call, past those of code that did not run again."""
        site = self._frames.site()
        for i, read in enumerate(self._coming):
            if read.function == func and read.site == site:
                for _ in range(i + 1):
                    self._coming.popleft()
                return read
        return None


def _fix_sizes(result: Any, shapes: Sequence[tuple[int, ...]]) -> Any:
    """Returns the result with its sizes as recorded."""
    known = iter(shapes)
    return pytree.tree_map_only(torch.Tensor, lambda t: _fix_size(t, next(known)), result)


def _fix_size(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    for size, known in zip(tensor.shape, shape, strict=True):
        torch._check(size == known)
    return tensor.view(shape)
