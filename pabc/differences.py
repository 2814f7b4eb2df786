"""Measures how much each region's output changes from one diffusion step to the next."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pabc.base.arguments import bind_call, check_constants, leaf_key
from pabc.base.forward import inner_forward
from pabc.base.structure import flatten
from pabc.options import Options
from pabc.passes import Cut, Cuts, Guarded
from pabc.pipeline import analyze


class Differences:
    """A stand-in for a model that measures, per region and step, how much its cuts change.

    It is called as the model is, once a step, computes everything and returns the model's own
    bits. What it records is the mean squared difference of a region's cuts (what :func:`compile`
    would keep, all cuts of the region together) to the same cuts one call earlier. Curves that are
    flat and low over many steps are what a schedule can exploit.

    Args:
        model: the transformer, in eval mode; left as it is, its parameters shared.
        cut: which value of a region is looked at, as for :func:`pabc.compile`.
        kinds: as for :func:`pabc.compile`.
        latents: as for :func:`pabc.compile`.

    Source: the analysis behind Pyramid Attention Broadcast, arXiv 2408.12588, section 3.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        cut: Cut = "attention",
        kinds: Mapping[str, str] | None = None,
        latents: str | None = None,
    ) -> None:
        self._model = model
        self._options = Options.of(cut=cut, kinds=kinds, latents=latents, disable=("nest",))
        self._graphs: dict[Any, Guarded] = {}
        self._key: Any = None
        self._meter = _ChangeMeter()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs one diffusion step, with the model's own arguments and result.

        Raises:
            ValueError: the inputs' shapes, dtypes or constants differ from those of the step
                before (call :meth:`reset` first), or the model cannot be captured.
            RuntimeError: the model is in training mode.
        """
        guarded, inputs = self._select(args, kwargs)
        with torch.no_grad():
            hoisted = guarded.prologue.graph(*inputs)
            outputs = guarded.graph(self._meter, *inputs, *hoisted)
        self._meter.steps += 1
        return guarded.captured.signature.out_spec.unflatten(outputs)

    def reset(self) -> None:
        """Forgets what was measured: the next call is step 0 of a new generation."""
        self._key = None
        self._meter = _ChangeMeter()

    def curves(self) -> dict[str, npt.NDArray[np.float64]]:
        """Returns kind -> float64 [num_layers, num_steps - 1].

        Column i holds the differences between steps i and i + 1; rows are the regions of the kind
        in execution order. Raises `RuntimeError` before the second step.
        """
        if self._meter.steps < 2:
            raise RuntimeError(
                f"differences: expected two steps or more, found {self._meter.steps}; "
                "call it in place of the model for a whole generation first"
            )
        regions = self._graphs[self._key].regions
        rows: dict[str, list[npt.NDArray[np.float64]]] = {}
        for slot, region in enumerate(regions):
            measured = torch.stack(self._meter.errors[slot]).double().cpu().numpy()
            rows.setdefault(region.kind, []).append(measured)
        return {kind: np.stack(measured) for kind, measured in rows.items()}

    def _select(self, args: Any, kwargs: Any) -> tuple[Guarded, list[Any]]:
        """Returns the guarded graph for these arguments, and its flat inputs."""
        if self._model.training:
            raise RuntimeError(
                "differences: expected a model in eval mode, found training mode; "
                "call .eval() first"
            )
        forward = inner_forward(self._model)
        bound_args, bound_kwargs = bind_call(forward, args, kwargs)
        inputs, structure = flatten((bound_args, bound_kwargs))
        check_constants(
            (bound_args, bound_kwargs), inputs, tuple(inspect.signature(forward).parameters)
        )
        key = (structure, *map(leaf_key, inputs))
        if self._key not in (None, key):
            raise ValueError(
                "differences: expected inputs with the shapes, dtypes and constants of the step "
                "before, found others; call reset() first"
            )
        if key not in self._graphs:
            self._graphs[key], _ = analyze(self._model, bound_args, bound_kwargs, self._options)
        self._key = key
        return self._graphs[key], inputs


class _ChangeMeter:
    """The state of steps that reuse nothing, and compare each cut with that of the step before."""

    def __init__(self) -> None:
        self.steps = 0
        self.errors: dict[int, list[torch.Tensor]] = {}
        self._last: dict[int, Cuts] = {}

    def read(self, slot: int) -> None:
        return None

    def write(self, slot: int, cuts: Cuts) -> None:
        if slot in self._last:
            self.errors.setdefault(slot, []).append(_mean_square(cuts, self._last[slot]))
        self._last[slot] = cuts


def _mean_square(cuts: Cuts, before: Cuts) -> torch.Tensor:
    """Returns the mean squared difference over all elements of all cuts, without synchronizing."""
    total = torch.stack(
        [(a.float() - b.float()).square().sum() for a, b in zip(cuts, before, strict=True)]
    )
    return total.sum() / sum(cut.numel() for cut in cuts)
