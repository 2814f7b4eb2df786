"""Takes the result of a model apart into the tensors that are kept, and builds it from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import numpy as np
import torch

from pabc.base.structure import Structure, flatten, holds_tensors
from pabc.passes import CacheDtype, Cuts, decode_cut, encode_cut, form_of


@dataclass(frozen=True, slots=True)
class KeptForm:
    """The form in which one tensor of a result is kept.

    Attributes:
        layout: its shape, dtype and device.
        cache_dtype: how it is encoded.
    """

    layout: tuple[torch.Size, torch.dtype, torch.device]
    cache_dtype: CacheDtype

    @property
    def width(self) -> int:
        """The number of tensors that are kept of it."""
        return 2 if self.cache_dtype == "fp8" else 1


@dataclass(frozen=True)
class Result:
    """The result of a call, without the values of its tensors.

    Attributes:
        structure: the containers.
        leaves: the leaves; None for tensors.
        tensors: position of each tensor among the leaves -> the form in which it is kept.
        repeated: position of each leaf that is a tensor which came before -> its position there.
        passed: position of each leaf that is a tensor of the call's own arguments, as it was passed
            -> the position of that argument among the flattened ones.
    """

    structure: Structure
    leaves: tuple[Any, ...]
    tensors: Mapping[int, KeptForm]
    repeated: Mapping[int, int]
    passed: Mapping[int, int]

    @classmethod
    def of(cls, result: Any, unwritten: Mapping[int, int], cache_dtype: CacheDtype) -> Result:
        """Returns the description of a result.

        `unwritten`: the identities of the tensors among the arguments that the call did not write
        to, each with its position. Raises: ValueError for a result that hides tensors.
        """
        leaves, structure = flatten(result)
        first: dict[int, int] = {}
        tensors, repeated, passed = {}, {}, {}
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, torch.Tensor) or leaf.layout != torch.strided:
                _check_constant(leaf)
            elif id(leaf) in unwritten:
                passed[i] = unwritten[id(leaf)]
            elif id(leaf) in first:
                repeated[i] = first[id(leaf)]
            else:
                first[id(leaf)] = i
                layout = (leaf.shape, leaf.dtype, leaf.device)
                tensors[i] = KeptForm(layout, form_of(leaf, cache_dtype))
        constants = (None if isinstance(x, torch.Tensor) else x for x in leaves)
        return cls(structure, tuple(constants), tensors, repeated, passed)

    def has_form_of(self, other: Result) -> bool:
        """Returns whether values of the two can be added up."""
        mine = self.structure, self.tensors, self.repeated, self.passed
        return mine == (other.structure, other.tensors, other.repeated, other.passed)

    def keep(self, result: Any, *, in_host_memory: bool) -> Cuts:
        """Returns copies of the result's tensors, as they are kept."""
        leaves, _ = flatten(result)
        kept: list[torch.Tensor] = []
        with torch.no_grad():
            for i, form in self.tensors.items():
                own = leaves[i].detach()
                encoded = encode_cut(own, form.cache_dtype)
                kept.extend(x.clone() if x is own else x for x in encoded)
        return tuple(map(_to_host, kept)) if in_host_memory else tuple(kept)

    def decode(self, kept: Cuts) -> list[torch.Tensor]:
        """Returns the tensors that were kept, on their own devices. With `"keep"`, they are the
        kept ones themselves."""
        rest = iter(kept)
        return [
            decode_cut(
                [next(rest).to(form.layout[2]) for _ in range(form.width)],
                form.cache_dtype,
                form.layout[1],
            )
            for form in self.tensors.values()
        ]

    def build(self, tensors: Sequence[torch.Tensor], arguments: Sequence[Any]) -> Any:
        """Returns a result with these tensors, for a call with these flattened arguments."""
        leaves = list(self.leaves)
        for i, tensor in zip(self.tensors, tensors, strict=True):
            leaves[i] = tensor
        for i, position in self.repeated.items():
            leaves[i] = leaves[position]
        for i, position in self.passed.items():
            leaves[i] = arguments[position]
        return self.structure.unflatten(leaves)


def _check_constant(leaf: Any) -> None:
    """Raises ValueError for what is no dense tensor, and may still follow from the latents."""
    found = type(leaf).__name__
    if isinstance(leaf, torch.Tensor):
        found += f" of layout {leaf.layout}"
    elif holds_tensors(leaf):
        found += " that holds tensors"
    elif not isinstance(leaf, np.ndarray | Set | Iterator | FunctionType | partial):
        return
    raise ValueError(
        f"expected a result of tensors in containers or dataclasses, found a {found}, which "
        "cannot be forecast"
    )


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)
