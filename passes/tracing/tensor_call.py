"""tensor_call: a call, or a result, as its tensors and everything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pabc.base.structure import Structure, flatten


@dataclass(frozen=True, slots=True)
class TensorCall:
    """The arguments of a call without its tensors.

    Attributes:
        leaves: the flattened arguments, None in place of tensors.
        places: the positions of the tensors.
        structure: the containers around the leaves.
    """

    leaves: tuple[Any, ...]
    places: tuple[int, ...]
    structure: Structure

    @classmethod
    def of(
        cls, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[TensorCall, tuple[torch.Tensor, ...]]:
        """Returns the call and its tensors."""
        leaves, structure = flatten((tuple(args), dict(kwargs)))
        places = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))
        others = tuple(None if i in places else leaf for i, leaf in enumerate(leaves))
        return cls(others, places, structure), tuple(leaves[i] for i in places)

    def fill(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns args and kwargs with these tensors."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = self.structure.unflatten(leaves)
        return args, kwargs

    def run(self, function: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> Any:
        """Calls `function` with these tensors."""
        args, kwargs = self.fill(tensors)
        return function(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class ResultLayout:
    """The layout of a tensor in a result."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> ResultLayout:
        """Returns the layout of a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def empty(self) -> torch.Tensor:
        """Returns an uninitialized tensor of this layout."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)
