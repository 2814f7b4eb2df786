"""What a call must agree with before anything kept may be read in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from numbers import Integral
from typing import Any, NamedTuple

import torch

from pabc.passes.tracing.numbers import is_number


class GuardError(RuntimeError):
    """A call contradicts the plan, or the state it would use: says what was expected and found."""


class _Value(NamedTuple):
    """The first element of an input: a number, and how exactly its dtype holds one."""

    number: float
    precision: float
    is_whole: bool

    def is_close(self, expected: float) -> bool:
        """Whether `expected`, put into this dtype, gives this value."""
        difference = abs(expected - self.number)
        if self.is_whole:
            return difference < 1
        return difference <= self.precision * max(abs(expected), abs(self.number))


_SPELLINGS: tuple[Callable[[float], float], ...] = (
    lambda t: t,
    lambda t: t / 1000,
    lambda t: t * 1000,
    lambda t: 1000 - t,
    lambda t: 1 - t,
    lambda t: 1 - t / 1000,
)
"""How models want a scheduler's timestep t: as it is, as a noise level, counted from the data."""
_FORWARD = range(3)
"""Those of them that count as the scheduler does."""
_Spelled = tuple[int, int]
"""A position among the inputs, and the spelling it follows."""


class Clock:
    """Compares the timesteps that one sequence of calls brings with those of its plan.

    Which input is the timestep is not known: an input counts as one if, at the first call, it is
    that step's timestep in one of the usual spellings, and is followed as long as it goes on being
    so. Where none is found, nothing is checked. What lies on another device than the CPU is copied
    without waiting, and looked at one call later. A schedule for `range(n)` names no timesteps.
    """

    def __init__(self, timesteps: tuple[float, ...]) -> None:
        self._timesteps = timesteps
        self._are_indices = timesteps == tuple(range(len(timesteps)))
        self._followed: list[_Spelled] = []
        self._earlier: dict[int, _Value] = {}
        self._num_judged = 0
        self._pending: Callable[[], None] | None = None

    def check(self, step: int, leaves: Sequence[Any], positions: Sequence[int]) -> None:
        """Notes the call made at `step`. Raises GuardError where a call was another step's.

        `positions`: which leaves may be timesteps; see :func:`find_numbers`.
        """
        if self._pending is not None:
            judge, self._pending = self._pending, None
            judge()
        if self._num_judged > 1:
            positions = tuple(dict.fromkeys(i for i, _ in self._followed))
        if self._are_indices or not positions:
            return
        readings = {i: _read(leaves[i]) for i in positions}
        values = {i: r for i, r in readings.items() if isinstance(r, _Value)}
        if len(values) == len(readings):
            self._judge(step, values)
        else:
            self._pending = lambda: self._judge(
                step, {i: r if isinstance(r, _Value) else r() for i, r in readings.items()}
            )

    def _judge(self, step: int, values: dict[int, _Value]) -> None:
        earlier, self._earlier = self._earlier, values
        self._num_judged += 1
        if self._num_judged == 1:
            candidates = [(i, kind) for i in values for kind in range(len(_SPELLINGS))]
            self._followed = [at for at in candidates if self._is_step(step, at, values)]
            return
        left = [at for at in self._followed if self._is_step(step, at, values)]
        if self._num_judged == 2 and not self._followed:
            self._check_start(step, earlier, values)
        elif not left and not (self._num_judged == 2 and self._is_constant(earlier, values)):
            self._fail(step, self._followed[0], values)
        self._followed = left

    def _is_constant(self, earlier: Mapping[int, _Value], values: Mapping[int, _Value]) -> bool:
        """At the second call: whether what was like a timestep stays, while another input moves."""
        return all(values[i] == earlier[i] for i, _ in self._followed) and values != earlier

    def _is_step(self, step: int, at: _Spelled, values: Mapping[int, _Value]) -> bool:
        """Whether an input is the timestep of that step, so spelled; zeros say nothing."""
        position, kind = at
        value, expected = values[position], _SPELLINGS[kind](self._timesteps[step])
        return value.is_close(expected) and (value.number != 0 or self._num_judged > 1)

    def _check_start(
        self, step: int, earlier: Mapping[int, _Value], values: Mapping[int, _Value]
    ) -> None:
        """At the second call: whether the two were neighbors elsewhere in the plan."""
        for start, (t, after) in enumerate(zip(self._timesteps, self._timesteps[1:], strict=False)):
            for at in ((i, kind) for i in values for kind in _FORWARD):
                if (
                    t != after
                    and earlier[at[0]].number != 0
                    and self._is_step(start, at, earlier)
                    and self._is_step(start + 1, at, values)
                ):
                    self._fail(step, at, values)

    def _fail(self, step: int, at: _Spelled, values: Mapping[int, _Value]) -> None:
        spell, steps = _SPELLINGS[at[1]], range(len(self._timesteps))
        same = [s for s in steps if self._is_step(s, at, values)]
        if step - 1 in same:
            remedy = (
                f"that of step {step - 1} again: where a step makes several calls (guidance), name "
                "them: `with fast.cache_context('cond'): ...`"
            )
        elif 0 in same:
            remedy = "that of step 0: fast.reset() ends a generation that is not complete"
        elif same:
            remedy = f"that of step {same[0]}: make the schedule from the timesteps that run"
        else:
            remedy = "no step's: make the schedule from the timesteps that run"
        raise GuardError(
            f"expected timestep {spell(self._timesteps[step]):g} at step {step}, found "
            f"{values[at[0]].number:g}, {remedy}"
        )


def find_numbers(leaves: Sequence[Any]) -> tuple[int, ...]:
    """The positions of what may be a timestep: numbers, and tensors of up to one dimension."""
    return tuple(i for i, leaf in enumerate(leaves) if is_number(leaf) or _is_scalar(leaf))


def _is_scalar(leaf: Any) -> bool:
    if not isinstance(leaf, torch.Tensor) or leaf.is_meta:
        return False
    is_real = leaf.dtype is not torch.bool and not leaf.is_complex()
    return leaf.ndim <= 1 and leaf.numel() > 0 and is_real


def _read(leaf: Any) -> _Value | Callable[[], _Value]:
    """The first element, or, where it is not at hand, what waits for it."""
    if not isinstance(leaf, torch.Tensor):
        return _Value(float(leaf), torch.finfo(torch.float32).eps, isinstance(leaf, Integral))
    precision = _precision(leaf.dtype)
    is_whole = precision == 0
    first = leaf if leaf.ndim == 0 else leaf[0]
    if first.is_cpu:
        return _Value(first.item(), precision, is_whole)
    copy = torch.empty((), dtype=first.dtype, pin_memory=first.is_cuda)
    copy.copy_(first, non_blocking=True)
    arrived = torch.cuda.Event() if first.is_cuda else None
    if arrived is not None:
        arrived.record()

    def get() -> _Value:
        if arrived is not None:  # it was recorded a step ago
            arrived.synchronize()
        return _Value(copy.item(), precision, is_whole)

    return get


@cache
def _precision(dtype: torch.dtype) -> float:
    """How far two roundings of one number may lie apart, relative to it; 0: whole numbers."""
    return 2 * torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
