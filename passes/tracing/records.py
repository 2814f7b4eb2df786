"""records: one value that a forward took from tensor data, and how it is taken again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .outside import TensorCall

Measure = Callable[[Sequence[torch.Tensor]], Any]
"""Takes a value from tensors, or what the size of a result follows from."""


@dataclass(frozen=True, slots=True)
class Again:
    """Calls what the model called."""

    function: Callable[..., Any]
    call: TensorCall

    def __call__(self, given: Sequence[torch.Tensor]) -> Any:
        """The value that is read."""
        return self.call.run(self.function, given)


@dataclass(frozen=True, slots=True)
class ShapesOf:
    """Calls what the model called, for the shapes of its results."""

    function: Callable[..., Any]
    call: TensorCall

    def __call__(self, given: Sequence[torch.Tensor]) -> Any:
        """One shape per tensor."""
        return tuple(tuple(t.shape) for t in tensors_in(self.call.run(self.function, given)))


@dataclass(frozen=True, slots=True)
class Count:
    """How many elements of each mask are set."""

    def __call__(self, given: Sequence[torch.Tensor]) -> Any:
        """One number per mask."""
        return tuple(int(t.count_nonzero()) for t in given)


@dataclass(frozen=True, slots=True)
class Total:
    """How many repeats there are."""

    def __call__(self, given: Sequence[torch.Tensor]) -> Any:
        """The sum."""
        return int(given[0].sum())


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of a number: how it compares, the answer in a tuple; None: its value."""

    ask: Callable[[Any], bool] | None

    def __call__(self, given: Sequence[torch.Tensor]) -> Any:
        """The answer for the number that a tensor holds."""
        return self.answer(given[0].item())

    def answer(self, number: Any) -> Any:
        """The answer for a number."""
        if self.ask is None:
            return number
        return (bool(self.ask(number)),)


@dataclass(frozen=True, slots=True)
class Read:
    """One value taken from data.

    Attributes:
        function: what was called, e.g. `torch.Tensor.item`.
        site: file and line of the model's code that called it.
        path: the qualified name of the module whose code that is; empty for the model itself.
        value: what came out: a number, an array.
        shapes: of a result whose size follows from data; then `value` is what the size follows
            from: how many elements of a mask are set, how many repeats there are.
        compared: whether `value` is how a number compares, in the order of comparisons.
    """

    function: Callable[..., Any]
    site: str
    path: str
    value: Any
    shapes: tuple[tuple[int, ...], ...] | None = None
    compared: bool = False

    @property
    def is_float_array(self) -> bool:
        """Whether it is an array of floating-point values: never the same twice."""
        return getattr(self.value, "ndim", 0) > 0 and self.value.dtype.kind == "f"

    def __str__(self) -> str:
        name = getattr(self.function, "__name__", str(self.function))
        size = getattr(self.value, "shape", None)
        found = str(self.value) if size is None else f"an array of shape {tuple(size)}"
        verb = "takes" if self.shapes is not None else "compares as" if self.compared else "gives"
        return f"{name} {verb} {found} in {self.path or 'the model'} ({self.site})"


@dataclass(frozen=True, slots=True)
class Checked:
    """A read with the tensors it was taken from, as they occur in a trace or its graph."""

    read: Read
    again: Measure
    tensors: tuple[Any, ...]


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors in nested containers, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
