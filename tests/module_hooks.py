"""Reuse of blocks by hooks on a model's modules: what pabc's coarser regions are compared with.

A part is a list of modules that follow one another, such as one block or all blocks. At a step that
computes it, the hooks keep what it adds: the output of its last module, minus the output that the
model gives there if the part's modules return what they are given. At a step that reuses it, its
modules return what they are given, and the last one adds what was kept. Nothing here knows pabc.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Part: TypeAlias = Sequence[nn.Module]
Streams: TypeAlias = "tuple[Tensor | None, ...]"


class PartHooks:
    """Hooks on the parts of a model; `close` removes them.

    `names`: the parameters of a module's forward that its results go on from, in the order of the
    results; a module with one result goes on from its first parameter.
    """

    def __init__(self, model: nn.Module, parts: Sequence[Part], names: Sequence[str]) -> None:
        self.model, self.parts, self.names = model, parts, names
        self.passed: Collection[int] = ()
        """The parts whose modules return what they are given."""
        self.added: Mapping[int, Streams] = {}
        """What the last modules of parts add to that."""
        self.ends: dict[int, Streams] = {}
        """What the last modules of parts returned."""
        self._is_tuple: dict[nn.Module, bool] = {}
        self._modules = [module for part in parts for module in part]
        for index, part in enumerate(parts):
            for module in part:
                module.forward = self._wrap(module, index, module is part[-1])

    def close(self) -> None:
        for module in self._modules:
            module.__dict__.pop("forward", None)

    def _wrap(self, module: nn.Module, part: int, is_last: bool) -> Callable[..., Any]:
        forward = module.forward
        signature = inspect.signature(forward)

        def call(*args: Any, **kwargs: Any) -> Any:
            if part in self.passed:
                given = signature.bind(*args, **kwargs).arguments
                names = self.names if self._is_tuple[module] else list(given)[:1]
                results = tuple(given[name] for name in names)
                if is_last and part in self.added:
                    results = _combine(torch.add, results, self.added[part])
            else:
                found = forward(*args, **kwargs)
                self._is_tuple[module] = isinstance(found, tuple)
                results = found if isinstance(found, tuple) else (found,)
            if is_last:
                self.ends[part] = results
            return results if self._is_tuple[module] else results[0]

        return call

    def compute(self, call: Mapping[str, Any]) -> dict[int, Streams]:
        """Runs the model; returns what each part adds."""
        self._run(call, (), {})
        ends = dict(self.ends)
        kept = {}
        for part in range(len(self.parts)):
            self._run(call, (part,), {})
            kept[part] = _combine(torch.sub, ends[part], self.ends[part])
        return kept

    def reuse(self, call: Mapping[str, Any], kept: Mapping[int, Streams]) -> tuple[Any, ...]:
        """Returns the results of the model that reuses these parts."""
        return self._run(call, tuple(kept), kept)

    def _run(self, call: Mapping[str, Any], passed: Any, added: Any) -> tuple[Any, ...]:
        self.passed, self.added = passed, added
        with torch.no_grad():
            return self.model(**call)


def _combine(op: Callable[..., Tensor], one: Streams, other: Streams) -> Streams:
    """Applies an op to each stream; a stream that one side lacks is that of the other."""
    pairs = zip(one, other, strict=True)
    return tuple(op(a, b) if a is not None and b is not None else a for a, b in pairs)
