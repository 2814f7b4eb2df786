"""Finds and reads the timesteps among a call's arguments."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from numbers import Integral
from typing import Any, NamedTuple

import torch

from pabc.base.numbers import is_number
from pabc.base.structure import Structure
from pabc.internals import pytree
from pabc.internals.tensors import version_of

ArgPath = str
"""The path of an argument in a call; the same in calls of different structures."""

_FEW = 4096
"""The most elements of a tensor that are copied one by one."""
_SHARE = 2
"""A timestep of several dimensions has at most 1/2 of the elements of the largest tensor."""


class TimestepArgument(NamedTuple):
    """An argument that is a timestep: its path, and its spelling, an index into `SPELLINGS`."""

    path: ArgPath
    spelling: int


SPELLINGS: tuple[Callable[[float], float], ...] = (
    lambda t: t,
    lambda t: t / 1000,
    lambda t: t * 1000,
    lambda t: 1000 - t,
    lambda t: 1 - t,
    lambda t: 1 - t / 1000,
)
"""The forms in which models take a scheduler's timestep t: as it is, as a noise level, reversed."""
FORWARD = range(3)
"""The spellings that are not reversed."""


class Reading(NamedTuple):
    """The values of an argument that may be a timestep.

    Attributes:
        elements: all of them, or the first, last, least and largest.
        precision: the largest relative difference between two roundings of one number; 0: whole
            numbers.
        number: the timestep, which all elements equal, except those of clean tokens or frames,
            which are 0; None: there are several timesteps.
    """

    elements: tuple[float, ...]
    precision: float
    number: float | None

    @classmethod
    def of(cls, elements: tuple[float, ...], precision: float) -> Reading:
        """Returns the reading of these elements."""
        distinct = set(elements)
        if len(distinct) > 1:
            distinct.discard(0.0)
        return cls(elements, precision, distinct.pop() if len(distinct) == 1 else None)

    def is_close(self, expected: float) -> bool:
        """Returns whether `expected`, rounded to this dtype, may give this timestep."""
        number = self.number
        if number is None:
            return False
        difference = abs(expected - number)
        if self.precision == 0:
            return difference < 1 and (difference == 0 or abs(expected) >= 1)
        return difference <= self.precision * max(abs(expected), abs(number))


PendingReading = Callable[[], Reading]
"""Waits for a device and returns the reading."""


class Reader:
    """Reads the arguments that may be timesteps in the calls of one model.

    Not thread-safe. A tensor that is the same as at the call before, unchanged, is not read again.
    """

    def __init__(self, known: TimestepArguments) -> None:
        self._known_arguments = known
        self._known: dict[ArgPath, tuple[weakref.ref[torch.Tensor], int, Reading]] = {}

    def read(
        self, structure: Structure, leaves: Sequence[Any], where: Mapping[str, Any]
    ) -> dict[ArgPath, Reading | PendingReading]:
        """Returns what may be a timestep, by path; `where`: what is stated beside the call."""
        paths = self._known_arguments.paths(structure)
        found = {paths[i]: self._read(paths[i], leaves[i]) for i in find_candidates(leaves)}
        return found | self._read_context(where)

    def read_at(
        self,
        structure: Structure,
        leaves: Sequence[Any],
        where: Mapping[str, Any],
        arguments: tuple[TimestepArgument, ...],
    ) -> dict[ArgPath, Reading | PendingReading]:
        """Returns the readings of these arguments, as far as the call has them."""
        positions = self._known_arguments.positions(structure, arguments)
        found = {p: read(leaves[i]) for p, i in positions.items() if may_be_timestep(leaves[i])}
        return found | self._read_context(where) if where else found

    def _read_context(self, where: Mapping[str, Any]) -> dict[ArgPath, Reading | PendingReading]:
        return {
            f"cache_context {name}": read(value)
            for name, value in where.items()
            if may_be_timestep(value)
        }

    def _read(self, path: ArgPath, leaf: Any) -> Reading | PendingReading:
        if not isinstance(leaf, torch.Tensor) or leaf.is_inference():
            return read(leaf)
        known = self._known.get(path)
        if known is not None and known[0]() is leaf and known[1] == version_of(leaf):
            return known[2]
        reading = read(leaf)
        if isinstance(reading, Reading):
            self._known[path] = weakref.ref(leaf), version_of(leaf), reading
        return reading


class TimestepArguments:
    """The arguments of one model that are known as timesteps, by the timesteps of the schedule.

    All generations of the model share them.

    Attributes:
        num_waits: how many calls have waited for a device so far.
    """

    def __init__(self) -> None:
        self.num_waits = 0
        self._arguments: dict[tuple[float, ...], tuple[TimestepArgument, ...]] = {}
        self._last: tuple[tuple[float, ...] | None, tuple[TimestepArgument, ...]] = None, ()
        self._paths: dict[Structure, tuple[ArgPath, ...]] = {}
        self._positions: dict[
            tuple[Structure, tuple[TimestepArgument, ...]], dict[ArgPath, int]
        ] = {}

    def get(self, timesteps: tuple[float, ...]) -> tuple[TimestepArgument, ...]:
        """Returns those that followed this schedule over two distinct timesteps or more."""
        last, arguments = self._last
        if timesteps is not last:  # whose hash would take longer
            arguments = self._arguments.get(timesteps, ())
            self._last = timesteps, arguments
        return arguments

    def set(self, timesteps: tuple[float, ...], arguments: tuple[TimestepArgument, ...]) -> None:
        """Sets the arguments that are timesteps under this schedule."""
        self._arguments[timesteps] = arguments
        self._last = None, ()

    def position(self, structure: Structure, path: ArgPath) -> int | None:
        """Returns which leaf is at a path; None if calls of this structure do not have it."""
        paths = self.paths(structure)
        return paths.index(path) if path in paths else None

    def paths(self, structure: Structure) -> tuple[ArgPath, ...]:
        """Returns the path of each leaf of calls of this structure."""
        paths = self._paths.get(structure)
        if paths is None:
            numbers = structure.unflatten_plain(range(structure.num_leaves))
            found = pytree.tree_flatten_with_path(numbers)[0]
            by_leaf = {leaf: pytree.keystr(path) for path, leaf in found}
            paths = tuple(by_leaf[i] for i in range(structure.num_leaves))
            self._paths[structure] = paths
        return paths

    def positions(
        self, structure: Structure, arguments: tuple[TimestepArgument, ...]
    ) -> dict[ArgPath, int]:
        """Returns which leaf is at each path, for the paths that calls of this structure have."""
        known = self._positions.get((structure, arguments))
        if known is None:
            wanted = {argument.path for argument in arguments}
            paths = enumerate(self.paths(structure))
            known = {path: i for i, path in paths if path in wanted}
            self._positions[structure, arguments] = known
        return known


def find_candidates(leaves: Sequence[Any]) -> list[int]:
    """Returns which leaves may be timesteps: numbers, and tensors much smaller than the latents."""
    most = max((x.numel() for x in leaves if isinstance(x, torch.Tensor)), default=0) // _SHARE
    return [
        i
        for i, leaf in enumerate(leaves)
        if may_be_timestep(leaf)
        and (not isinstance(leaf, torch.Tensor) or leaf.ndim <= 1 or leaf.numel() <= most)
    ]


def may_be_timestep(leaf: Any) -> bool:
    """Returns whether a number can be read from an argument."""
    if not isinstance(leaf, torch.Tensor):
        return is_number(leaf)
    return not leaf.is_meta and leaf.numel() > 0 and _precision(leaf.dtype) is not None


def read(leaf: Any) -> Reading | PendingReading:
    """Returns the values of an argument, or a function that waits for them."""
    if not isinstance(leaf, torch.Tensor):
        precision = 0.0 if isinstance(leaf, Integral) else torch.finfo(torch.float32).eps
        return Reading.of((float(leaf),), precision)
    precision = _precision(leaf.dtype) or 0.0
    if leaf.ndim <= 1 and leaf.is_cpu and leaf.numel() <= _FEW:
        return Reading.of(tuple(leaf.tolist()) if leaf.ndim else (leaf.item(),), precision)
    few = leaf if 0 not in leaf.stride() else _once(leaf)
    if few.numel() > _FEW:
        low, high = torch.aminmax(few)
        ends = few[(0,) * few.ndim], few[(-1,) * few.ndim]
        few = torch.stack([*ends, low, high])
    return Reading.of(_summarize(few), precision) if few.is_cpu else _fetch(few, precision)


def _once(tensor: torch.Tensor) -> torch.Tensor:
    """Returns an expanded tensor without its repetitions."""
    return tensor[tuple(0 if stride == 0 else slice(None) for stride in tensor.stride())]


def _summarize(tensor: torch.Tensor) -> tuple[float, ...]:
    if tensor.numel() == 1:
        return (tensor.item(),)
    values = tensor.flatten().tolist()
    return (values[0], values[-1], min(values), max(values))


def _fetch(tensor: torch.Tensor, precision: float) -> PendingReading:
    """Copies a tensor to the CPU without waiting; returns a function that waits."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    copy.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event() if tensor.is_cuda else None
    if arrived is not None:
        arrived.record()

    def get() -> Reading:
        if arrived is not None:
            arrived.synchronize()
        return Reading.of(_summarize(copy), precision)

    return get


@cache
def _precision(dtype: torch.dtype) -> float | None:
    """Returns the largest relative difference between two roundings of one number; 0 for whole
    numbers, None for dtypes that timesteps do not have."""
    if dtype.is_floating_point:
        return 2 * torch.finfo(dtype).eps if dtype.itemsize > 1 else None
    whole = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    return 0.0 if dtype in whole else None
