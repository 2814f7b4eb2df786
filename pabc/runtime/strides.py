"""Gives the inputs of a call the strides that the graphs are specialized on."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from typing import Any

import torch

from pabc import passes
from pabc.base.structure import flatten
from pabc.internals.tensors import version_of
from pabc.passes import (
    user_inputs,
)

_Stride = tuple[int, ...]


class Strides:
    """Copies those inputs whose strides are not those that the graphs are specialized on.

    Copies of conditions are kept: the same tensor, unchanged, gives the same copy again, so that
    the values that follow from it are not recomputed.

    Args:
        guarded: its placeholders are the state of a step, then the inputs.
        conditions: positions of the inputs of which copies are kept.
    """

    def __init__(self, guarded: passes.Guarded, conditions: Collection[int]) -> None:
        num_inputs = len(guarded.captured.signature.inputs)
        inputs = user_inputs(guarded.graph.graph)[1 : 1 + num_inputs]
        vals = [node.meta.get("val") for node in inputs]
        self._sizes = guarded.captured.sizes
        self._tensors = [i for i, val in enumerate(vals) if isinstance(val, torch.Tensor)]
        self._wanted = [() if self._sizes else vals[i].stride() for i in self._tensors]
        self._conditions = frozenset(conditions)
        self._known: dict[tuple[Any, ...], tuple[tuple[int, _Stride], ...]] = {}
        self._copies: dict[
            int, tuple[weakref.ref[torch.Tensor], tuple[int, int], torch.Tensor]
        ] = {}

    def fit(self, inputs: list[Any], only: Collection[int] | None = None) -> list[Any]:
        """Returns the inputs with the strides of the capture; `only`: positions of those needed."""
        tensors = [inputs[i] for i in self._tensors]
        strides = list(map(torch.Tensor.stride, tensors))
        if strides == self._wanted:
            return inputs
        key = tuple(strides)
        if self._sizes is not None:
            key = (*key, *[x.shape for x in tensors])
        wrong = self._known.get(key)
        if wrong is None:
            wrong = self._known[key] = self._find_wrong(inputs)
        if wrong:
            inputs = list(inputs)
            for i, wanted in wrong:
                if only is None or i in only:
                    inputs[i] = self._copy(i, inputs[i], wanted)
        return inputs

    def _find_wrong(self, inputs: Sequence[Any]) -> tuple[tuple[int, _Stride], ...]:
        wanted = self._wanted if self._sizes is None else self._sizes.strides(inputs)
        pairs = zip(self._tensors, wanted, strict=True)
        return tuple((i, strides) for i, strides in pairs if not _is_laid_out(inputs[i], strides))

    def _copy(self, i: int, tensor: torch.Tensor, strides: _Stride) -> torch.Tensor:
        if i not in self._conditions or tensor.is_inference():
            return _copy(tensor, strides)
        version = version_of(tensor), tensor.data_ptr()
        known = self._copies.get(i)
        if known is None or known[0]() is not tensor or known[1] != version:
            known = self._copies[i] = weakref.ref(tensor), version, _copy(tensor, strides)
        return known[2]


def without_overlaps(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments with contiguous copies of tensors whose elements share memory, such as
    expanded ones: later inputs could not be copied into such strides."""
    leaves, structure = flatten((args, kwargs))
    if not any(isinstance(leaf, torch.Tensor) and _overlaps(leaf) for leaf in leaves):
        return args, kwargs
    dense = [
        leaf.contiguous() if isinstance(leaf, torch.Tensor) and _overlaps(leaf) else leaf
        for leaf in leaves
    ]
    found: tuple[tuple[Any, ...], dict[str, Any]] = structure.unflatten(dense)
    return found


def _overlaps(tensor: torch.Tensor) -> bool:
    if tensor.layout is not torch.strided:
        return False
    dims = zip(tensor.stride(), tensor.shape, strict=True)
    reach = 1
    for stride, size in sorted(dim for dim in dims if dim[1] > 1):
        if stride < reach:
            return True
        reach = stride * size
    return False


def _is_laid_out(tensor: torch.Tensor, strides: _Stride) -> bool:
    """Returns whether the strides are these; for a dimension of one element, any stride fits."""
    dims = zip(tensor.shape, tensor.stride(), strides, strict=True)
    return all(size == 1 or found == wanted for size, found, wanted in dims)


def _copy(tensor: torch.Tensor, strides: _Stride) -> torch.Tensor:
    place = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return place.copy_(tensor)
