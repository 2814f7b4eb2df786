"""The model's tensors that a graph reads, kept in step with the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.fx import GraphModule

from pabc.passes.capture import CONSTANTS
from pabc.passes.ir import attribute


class Weights:
    """Parameters, buffers and constants by qualified name, shared with the model.

    A change of values in place needs nothing. A tensor that the user replaced is picked up by
    :meth:`follow`, which a program calls at the start of each generation.
    """

    def __init__(self, graphs: Sequence[GraphModule]) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        for module in (m for gm in graphs for m in gm.modules()):
            if isinstance(module, GraphModule):
                reads = [str(n.target) for n in module.graph.nodes if n.op == "get_attr"]
                values = ((name, attribute(module, name)) for name in reads)
                self._tensors.update((n, v) for n, v in values if isinstance(v, torch.Tensor))
        self._aliases: dict[str, tuple[str, ...]] = graphs[0].meta.get("aliases", {})
        self._layouts = {name: _layout(tensor) for name, tensor in self._tensors.items()}

    def get(self, names: Iterable[str]) -> list[torch.Tensor]:
        """The tensors of these names, as they are now."""
        return [self._tensors[name] for name in names]

    def follow(self, model: nn.Module, graphs: Sequence[GraphModule]) -> list[str] | None:
        """Rebinds tensors that were replaced in the model, in `graphs` too; returns their names.

        None if one is gone, changed its shape, strides, dtype or device, or is no longer shared by
        the modules that shared it: the graphs no longer fit.
        """
        replaced = {}
        for name, old in self._tensors.items():
            new = old if name.startswith(CONSTANTS) else _find(model, name)
            if not isinstance(new, torch.Tensor) or _layout(new) != self._layouts[name]:
                return None
            if any(_find(model, alias) is not new for alias in self._aliases.get(name, ())):
                return None
            if new is not old:
                replaced[name] = new
        for name, tensor in replaced.items():
            self._tensors[name] = tensor
            for gm in graphs:
                _rebind(gm, name, tensor)
        return list(replaced)


def _find(model: nn.Module, name: str) -> object:
    try:
        return attribute(model, name)
    except AttributeError:
        return None


def _layout(tensor: torch.Tensor) -> tuple[object, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def _rebind(gm: GraphModule, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    for module in gm.modules():
        if not isinstance(module, GraphModule):
            continue
        try:
            holder = module.get_submodule(owner)
        except AttributeError:
            continue
        if leaf in holder._parameters or leaf in holder._buffers:
            setattr(holder, leaf, tensor)
