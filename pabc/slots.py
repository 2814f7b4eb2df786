"""Slots: where cuts are kept, what a step does with one, and which slots contain others."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pabc.base.kinds import check_kind


class Action(enum.IntEnum):
    """The action of one step on one slot; the numbers are those of `Plan.actions`."""

    COMPUTE = 0
    """Compute the region; no later step reads the value."""
    STORE = 1
    """Compute the region and keep the value for a later step."""
    REUSE = 2
    """Read kept values; the region does not run."""
    COVERED = 3
    """A coarser region that contains the region is reused: it neither runs nor is it read."""


@dataclass(frozen=True, slots=True)
class SlotSpec:
    """One place where a cut is kept between steps.

    `layer` is the ordinal, in execution order, of the slot's region among the regions of its kind;
    the slots of one region share it. `nbytes` is the size of one stored value. `outer` names the
    slots of all coarser regions that contain this one. Raises `ValueError` on an unknown kind, or a
    number that is no integer of 0 or more.
    """

    name: str
    kind: str
    layer: int
    nbytes: int = 0
    outer: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"slot name: expected a string, found {self.name!r}")
        check_kind(self.kind, f"slot {self.name!r}")
        for field, value in (("layer", self.layer), ("nbytes", self.nbytes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(
                    f"slot {self.name!r}: expected {field} to be an integer of 0 or more, "
                    f"found {value!r}"
                )
        outer: Any = self.outer
        if not isinstance(outer, tuple | list) or not all(isinstance(n, str) for n in outer):
            raise ValueError(
                f"slot {self.name!r}: expected outer to be names of slots, found {outer!r}"
            )
        object.__setattr__(self, "outer", tuple(outer))


def find_covered(
    outer: Mapping[str, tuple[str, ...]], reuse: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Returns where slots are covered, [num_steps, num_slots] as `reuse`.

    `outer` is slot -> all slots that contain it, in the order of the columns. Raises `ValueError`
    if it names others, the slot itself, or not all.
    """
    columns = {name: column for column, name in enumerate(outer)}
    covered = np.zeros_like(reuse)
    for name, containing in outer.items():
        _check_outer(name, outer)
        for other in containing:
            covered[:, columns[name]] |= reuse[:, columns[other]]
    return covered


def _check_outer(name: str, outer: Mapping[str, tuple[str, ...]]) -> None:
    for other in outer[name]:
        if other not in outer or other == name:
            raise ValueError(f"slot {name!r}: expected outer to name other slots, found {other!r}")
        for missing in outer[other]:
            if missing not in outer[name]:
                raise ValueError(
                    f"slot {name!r}: expected outer to name all slots that contain it, found"
                    f" {other!r} without {missing!r}, which contains that"
                )
