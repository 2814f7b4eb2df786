"""Tells calls of a model that is not captured apart, by what a kept result follows from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from pabc.base.arguments import leaf_key
from pabc.base.numbers import is_number
from pabc.base.structure import Structure
from pabc.runtime.autocast import Autocast, active_autocast
from pabc.runtime.configuration import Configuration
from pabc.runtime.source import Source
from pabc.runtime.timesteps import TimestepArguments

_MANY = 3
"""Values of a number after which it counts as one that moves with the steps."""


@dataclass(frozen=True)
class CallForm:
    """The form that calls share which differ in values alone.

    Attributes:
        structure: the containers around the arguments.
        autocast: the autocast that they run under.
        leaves: shape, dtype and device of each tensor, and the type of anything else.
    """

    structure: Structure
    autocast: Autocast
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, structure: Structure, leaves: Sequence[Any]) -> CallForm:
        """Returns the form of a call, flattened."""
        layouts = [
            (x.shape, x.dtype, x.device) if isinstance(x, torch.Tensor) else type(x) for x in leaves
        ]
        return cls(structure, active_autocast(leaves), tuple(layouts))

    def difference(self, earlier: CallForm) -> str:
        """Returns in what the tensors of calls of this form differ from those of another."""
        mine = [leaf for leaf in self.leaves if isinstance(leaf, tuple)]
        theirs = [leaf for leaf in earlier.leaves if isinstance(leaf, tuple)]
        if len(mine) == len(theirs):
            for i, reason in ((1, "dtype"), (2, "device"), (0, "shape")):
                if any(a[i] != b[i] for a, b in zip(mine, theirs, strict=True)):
                    return reason
        return "arguments"


class Numbers:
    """The numbers among the arguments of calls of one form.

    A number that is the timestep, or has taken several values, moves with the steps, and a step may
    reuse what was computed with another one. The others say what is computed, as flags do.
    """

    def __init__(self, structure: Structure, leaves: Sequence[Any]) -> None:
        self._structure = structure
        self._values: dict[int, set[Any]] = {i: set() for i, x in enumerate(leaves) if is_number(x)}

    def moving(
        self, leaves: Sequence[Any], timesteps: tuple[float, ...], known: TimestepArguments
    ) -> frozenset[int]:
        """Returns the positions of the numbers that move with the steps."""
        if not self._values:
            return frozenset()
        arguments = known.get(timesteps)
        moving = set(known.positions(self._structure, arguments).values()) if arguments else set()
        for i, values in self._values.items():
            if len(values) < _MANY:
                values.add(leaves[i])
            if len(values) >= _MANY:
                moving.add(i)
        return frozenset(moving)


@dataclass(frozen=True, eq=False)
class OriginalSource:
    """The calls whose results may stand for one another.

    Attributes:
        form: structure, shapes, dtypes and devices of the arguments.
        constants: the values of the arguments that are no tensors; None for tensors.
        moving: positions of the numbers among them that move with the steps.
        configuration: of the model.
    """

    form: CallForm
    constants: tuple[Any, ...]
    moving: frozenset[int]
    configuration: Configuration

    @classmethod
    def of(
        cls,
        form: CallForm,
        leaves: Sequence[Any],
        moving: frozenset[int],
        configuration: Configuration,
    ) -> OriginalSource:
        """Returns the source of a call, flattened."""
        constants = [None if isinstance(x, torch.Tensor) else leaf_key(x) for x in leaves]
        return cls(form, tuple(constants), moving, configuration)

    @property
    def layout(self) -> tuple[()]:
        """Nothing: each form has a program of its own."""
        return ()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, OriginalSource):
            return NotImplemented
        return self._key == other._key and self._has_constants_of(other)

    def __hash__(self) -> int:
        return hash(self._key)

    def difference(self, earlier: Source) -> str:
        """Returns what tells calls of this source from those of an earlier one."""
        if not isinstance(earlier, OriginalSource):
            return "model"
        if self.form != earlier.form:
            return self.form.difference(earlier.form)
        if not self._has_constants_of(earlier):
            return "arguments"
        return "weights" if self.configuration.python == earlier.configuration.python else "model"

    @cached_property
    def _key(self) -> tuple[object, ...]:
        return self.form, self.configuration

    def _has_constants_of(self, other: OriginalSource) -> bool:
        if self.constants == other.constants:
            return True
        moving = self.moving | other.moving
        pairs = enumerate(zip(self.constants, other.constants, strict=True))
        return all(a == b for i, (a, b) in pairs if i not in moving)
