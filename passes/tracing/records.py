"""records: values that a forward reads from tensor data, and how to read them again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pabc.internals import pytree

from .tensor_call import TensorCall

Measure = Callable[[Sequence[torch.Tensor]], Any]
"""A function of tensors: reads a value, or what the size of a result follows from."""


@dataclass(frozen=True, slots=True)
class CallAgain:
    """Reads a value by the call that the model made."""

    function: Callable[..., Any]
    call: TensorCall

    def __call__(self, given: Sequence[torch.Tensor]) -> Any:
        """Returns the value."""
        return self.call.run(self.function, given)


@dataclass(frozen=True, slots=True)
class ShapesAgain:
    """Repeats the call that the model made, for the shapes of its results."""

    function: Callable[..., Any]
    call: TensorCall

    def __call__(self, given: Sequence[torch.Tensor]) -> Any:
        """Returns one shape per tensor."""
        return tuple(tuple(t.shape) for t in tensors_in(self.call.run(self.function, given)))


@dataclass(frozen=True, slots=True)
class MaskCount:
    """Counts the elements of masks that are set."""

    def __call__(self, given: Sequence[torch.Tensor]) -> Any:
        """Returns one number per mask."""
        return tuple(int(t.count_nonzero()) for t in given)


@dataclass(frozen=True, slots=True)
class RepeatCount:
    """Counts repeats."""

    def __call__(self, given: Sequence[torch.Tensor]) -> Any:
        """Returns their number."""
        return int(given[0].sum())


@dataclass(frozen=True, slots=True)
class NumberAnswer:
    """Answers a question about a number, in a tuple; without a question, returns its value."""

    ask: Callable[[Any], bool] | None

    def __call__(self, given: Sequence[torch.Tensor]) -> Any:
        """Returns the answer for the number that a tensor holds."""
        return self.answer(given[0].item())

    def answer(self, number: Any) -> Any:
        """Returns the answer for a number."""
        if self.ask is None:
            return number
        return (bool(self.ask(number)),)


@dataclass(frozen=True, slots=True)
class Read:
    """One value read from data.

    Attributes:
        function: the function that was called, e.g. `torch.Tensor.item`.
        site: file and line of the model's code that called it.
        path: the qualified name of the module whose code that is; empty for the model itself.
        value: the result: a number or an array. If only the size of the result follows from data,
            what the size follows from: the count of elements set in a mask, or of repeats.
        shapes: the shapes of such results, else None.
        compared: True if `value` is the outcome of a comparison.
    """

    function: Callable[..., Any]
    site: str
    path: str
    value: Any
    shapes: tuple[tuple[int, ...], ...] | None = None
    compared: bool = False

    @property
    def is_float_array(self) -> bool:
        """True for an array of floating-point values, which never repeat."""
        return getattr(self.value, "ndim", 0) > 0 and self.value.dtype.kind == "f"

    def __str__(self) -> str:
        name = getattr(self.function, "__name__", str(self.function))
        size = getattr(self.value, "shape", None)
        found = str(self.value) if size is None else f"an array of shape {tuple(size)}"
        verb = "takes" if self.shapes is not None else "compares as" if self.compared else "gives"
        return f"{name} {verb} {found} in {self.path or 'the model'} ({self.site})"


@dataclass(frozen=True, slots=True)
class Checked:
    """A read, with the tensors that it is read from.

    Attributes:
        read: the value.
        again: reads it again.
        tensors: the tensors, or their nodes in a graph.
    """

    read: Read
    again: Measure
    tensors: tuple[Any, ...]


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """Returns the tensors in nested containers, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
