"""TeaCache: computes a call when the model's inputs have changed enough since the last one.

Source: Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model", arXiv
2411.19108. The relative change (L1) of the input of the first block, modulated by the timestep, is
mapped by a polynomial of degree 4 to the relative change of the output; the polynomial is fitted
on a full generation. Its values are added up from step to step; a call is computed, and the sum
set to zero, when the sum exceeds a threshold. The first and the last call are always computed.

Here the output of the whole model is held, and the modulated input is what the first attention is
given. One decision holds for the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

DEGREE = 4


class Known(Exception):
    """Ends a call of which nothing more is computed."""


def find_modulated(model: nn.Module) -> nn.Module:
    """Returns the first attention: what it is given is the modulated input."""
    return next(m for m in model.modules() if hasattr(m, "to_q") and hasattr(m, "to_k"))


def change(new: Tensor, old: Tensor) -> float:
    """Returns the relative change in the L1 norm."""
    return float((new - old).abs().mean() / old.abs().mean())


class Inputs:
    """Collects the modulated input of each call of a full run; use as a context."""

    def __init__(self, model: nn.Module) -> None:
        self.found: list[Tensor] = []
        self._model = model

    def __enter__(self) -> list[Tensor]:
        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.found.append(args[0] if args else kwargs["hidden_states"])

        module = find_modulated(self._model)
        self._handle = module.register_forward_pre_hook(keep, with_kwargs=True)
        return self.found

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def fit(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> npt.NDArray[np.float64]:
    """Returns the coefficients of the polynomial, highest power first."""
    x, y = ([change(b, a) for a, b in pairwise(v)] for v in (inputs, outputs))
    return np.polyfit(x, y, min(DEGREE, len(x) - 1))


class TeaCache:
    """Stands in for a model whose loop calls it once a step."""

    def __init__(
        self,
        model: nn.Module,
        coefficients: npt.NDArray[np.float64],
        threshold: float,
        num_calls: int,
    ) -> None:
        self.model, self.threshold, self.num_calls = model, threshold, num_calls
        self._rescale = np.poly1d(coefficients)
        self.computed: list[int] = []
        self._step, self._total = -1, 0.0
        self._input: Tensor | None = None
        self._output: Any = None

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the output of the model, or the last one."""
        self._step += 1
        module = find_modulated(self.model)
        handle = module.register_forward_pre_hook(self._decide, with_kwargs=True)
        try:
            self._output = self.model(*args, **kwargs)
            self.computed.append(self._step)
        except Known:
            pass
        finally:
            handle.remove()
        return self._output

    def _decide(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        new = args[0] if args else kwargs["hidden_states"]
        if self._input is not None:
            self._total += float(self._rescale(change(new, self._input)))
        self._input = new
        is_end = self._step in (0, self.num_calls - 1)
        if not is_end and self._total < self.threshold:
            raise Known
        self._total = 0.0
