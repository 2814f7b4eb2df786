"""enlarge: a call of the same model in which every token axis of the latents has several positions.

An axis of one position (one frame, one row of patches) leaves no trace in a graph: whether it lies
in the batch or in the sequence, the shapes are the same. The model itself tells: called with more
frames, its graph shows where they go. That graph is for naming kinds; it never runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx import GraphModule

from pabc.base.forward import inner_forward
from pabc.base.structure import Structure, flatten

from .facts import Denoised, ModelCall, Signature
from .single_axes import find_single_axes, hinges_on_single_axes
from .tag import find_attentions, stated_by
from .tracing.fakes import fake_like
from .tracing.untouched import untouched

LARGEST = 32
"""How many times larger an axis may get: some models take one frame, or just as many as trained."""

Leaves = Sequence[Any]
"""The flattened arguments of a call."""


def enlarge_call(
    gm: GraphModule,
    call: ModelCall,
    signature: Signature,
    denoised: Denoised,
    *,
    kinds: Mapping[str, str],
) -> ModelCall | None:
    """Returns the smallest call that the model takes with the latents larger along each such axis.

    Returns None if no kind hinges on one, or the user states them all (`kinds`). Other inputs as
    large at the same place, counted from the last dimension (the mask of a video, say), grow with
    the latents if the model does not take the call otherwise. An axis that the model does not take
    larger stays as it is. No number of the larger call is lifted.

    Requires: axes (:func:`name_axes_pass`) of the graph of this call.
    """
    found = find_attentions(gm, denoised)
    axes = find_single_axes(gm, denoised, found)
    name = denoised.latents
    if not axes or not any(
        hinges_on_single_axes(f, name) and not stated_by(f, kinds) for f in found
    ):
        return None
    leaves: Leaves
    leaves, structure = flatten((call.args, call.kwargs))
    latents = signature.inputs.index(name)
    with _takes(call.model, structure) as takes:
        for dim in axes:
            taken = (larger for larger in _grow(leaves, latents, dim) if takes(larger))
            leaves = next(taken, leaves)
    args, kwargs = structure.unflatten(leaves)
    return ModelCall(model=call.model, args=args, kwargs=kwargs, opaque=call.opaque)


def _grow(leaves: Leaves, latents: int, dim: int) -> Iterator[Leaves]:
    """Larger and larger along `dim`: the latents alone, with one other input, with all others."""
    from_last = dim - leaves[latents].ndim
    size = leaves[latents].shape[dim]
    others = [
        i
        for i, x in enumerate(leaves)
        if i != latents and isinstance(x, torch.Tensor) and x.ndim >= -from_last
        if x.shape[from_last] == size
    ]
    for factor in range(2, LARGEST + 1):
        for chosen in dict.fromkeys([(), *((i,) for i in others), tuple(others)]):
            growing = {latents, *chosen}
            with unset_fake_temporarily():  # fake tensors stay in the mode of the call's others
                larger = [
                    x.repeat_interleave(factor, from_last) if i in growing else x
                    for i, x in enumerate(leaves)
                ]
            yield larger


@contextmanager
def _takes(model: nn.Module, structure: Structure) -> Iterator[Callable[[Leaves], bool]]:
    """Tells whether the model runs on inputs of some shapes; nothing is computed."""

    def takes(leaves: Leaves) -> bool:
        fakes = [fake_like(x, mode) if isinstance(x, torch.Tensor) else x for x in leaves]
        args, kwargs = structure.unflatten(fakes)
        try:
            inner_forward(model)(*args, **kwargs)
        except Exception:  # whatever a model says to a shape that it does not take
            return False
        return True

    log = logging.getLogger("torch._subclasses.fake_tensor")  # logs what it raises
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with torch.no_grad(), untouched(model), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield takes
    finally:
        log.setLevel(level)
