"""enlarge: finds a call of the model in which each token axis of the latents has several positions.

An axis of one position (one frame, one row of patches) leaves no trace in the shapes of a graph: it
may lie in the batch or in the sequence. The graph of a call with more frames shows where it lies.
That graph is used to name kinds; it never runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from pabc.base.forward import inner_forward
from pabc.base.structure import Structure, flatten
from pabc.internals.fakes import LOG, FakeTensorMode, unset_fake_temporarily

from .facts import Denoised, ModelCall, Signature
from .single_axes import find_single_axes, hinges_on_single_axes
from .tag import find_attentions, stated_by
from .tracing.fakes import fake_like
from .tracing.untouched import untouched

LARGEST = 32
"""The largest factor to try; some models accept only one frame, or only as many as in training."""

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
    """Returns the smallest call that the model accepts with these axes of the latents enlarged.

    Returns None if no kind depends on an axis of one position, or if the user states all such
    kinds (`kinds`). If the model rejects a call in which only the latents are larger, other inputs
    of the same size in the same dimension, counted from the last, grow as well (such as a video's
    mask). An axis that the model accepts at no larger size stays as it is. No number of the
    larger call is lifted.

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
    """Yields arguments larger and larger along `dim`.

    For each size: the latents alone, with each one of the other inputs, and with all of them.
    """
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
            with unset_fake_temporarily():  # keeps fake tensors in their own mode
                larger = [
                    x.repeat_interleave(factor, from_last) if i in growing else x
                    for i, x in enumerate(leaves)
                ]
            yield larger


@contextmanager
def _takes(model: nn.Module, structure: Structure) -> Iterator[Callable[[Leaves], bool]]:
    """Yields a predicate: the model accepts these arguments. It runs on fake tensors alone."""

    def takes(leaves: Leaves) -> bool:
        fakes = [fake_like(x, mode) if isinstance(x, torch.Tensor) else x for x in leaves]
        args, kwargs = structure.unflatten(fakes)
        try:
            inner_forward(model)(*args, **kwargs)
        except Exception:  # any error means that the model rejects the shapes
            return False
        return True

    log = logging.getLogger(LOG)  # logs what it raises
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with torch.no_grad(), untouched(model), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield takes
    finally:
        log.setLevel(level)
