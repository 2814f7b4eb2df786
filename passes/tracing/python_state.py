"""python_state: snapshots of the Python state that a model's forward can reach.

The state consists of attributes of modules and of the objects in them, containers, variables that
replaced methods and hooks close over, class attributes, and the globals that all this code names
(:mod:`pabc.passes.tracing.walk`). A snapshot tells what a traced forward has changed, and undoes
it; :mod:`pabc.passes.tracing.modules` describes the same holders for later comparison.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

from pabc.internals.tensors import version_of

from .holders import MISSING, Change, Holder
from .walk import walk_from

CountedValues = Literal["none", "unregistered", "all"]
"""The tensors whose values belong to a snapshot."""


class Snapshot:
    """The contents, at one time, of every holder that is reached from some roots.

    Attributes:
        holders: the holders that were reached.
        iterators: paths of objects whose state cannot be seen, such as iterators and random number
            generators.
    """

    def __init__(
        self, roots: Iterable[tuple[str, str | None, Any]], *, values: CountedValues = "none"
    ) -> None:
        """Takes the path, module and value of each root; see :class:`Holder`.

        `values` names the tensors whose values count. `"unregistered"` are those that are neither
        parameters nor buffers, which a trace replaces by fake ones: they are restored. `"all"` are
        not: see :class:`SavedWrites`.
        """
        walk = walk_from(roots)
        self.holders, self.iterators = walk.holders, walk.iterators
        self._contents = [holder.read() for holder in self.holders]
        self._versions: dict[int, tuple[torch.Tensor, int]] = {}
        self._values: list[tuple[torch.Tensor, int, torch.Tensor]] = []
        if values == "all":
            self._versions = {id(t): (t, version_of(t)) for t in self.tensors(registered=True)}
        elif values == "unregistered":
            tensors = self.tensors(registered=False)
            self._values = [(t, version_of(t), t.detach().clone()) for t in tensors]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        arguments: Mapping[str, Any] | None = None,
        *,
        values: CountedValues = "none",
    ) -> Snapshot:
        """Returns the state that a call of the model with these arguments can reach."""
        given = ((f"argument {name}", None, x) for name, x in (arguments or {}).items())
        return cls([("", "", model), *given], values=values)

    def changes(self) -> list[Change]:
        """Returns the differences between the state now and the snapshot."""
        return [
            Change(holder, key, old.get(key, MISSING), now.get(key, MISSING))
            for holder, old, now in self._read()
            for key in {**old, **now}
            if not _is_same(old.get(key, MISSING), now.get(key, MISSING))
            or self._is_written(now.get(key))
        ]

    def restore(self) -> None:
        """Undoes all changes; what has not changed is not written to."""
        for holder, old, now in self._read():
            if old.keys() != now.keys() or not all(_is_same(now[key], old[key]) for key in old):
                holder.write(old)
        for tensor, version, value in self._values:
            if version_of(tensor) != version:
                with torch.no_grad():
                    tensor.copy_(value)

    def _is_written(self, value: Any) -> bool:
        """Returns True for a tensor that was written to."""
        known = self._versions.get(id(value))
        return known is not None and version_of(known[0]) != known[1]

    def tensors(self, *, registered: bool) -> Iterator[torch.Tensor]:
        """Yields the tensors that are held, with `registered` also parameters and buffers."""
        for holder, contents in zip(self.holders, self._contents, strict=True):
            if holder.kind == "tensors" and not registered:
                continue
            for value in contents.values():
                if isinstance(value, torch.Tensor) and not value.is_inference():
                    yield value

    def _read(self) -> Iterator[tuple[Holder, dict[Any, Any], dict[Any, Any]]]:
        for holder, contents in zip(self.holders, self._contents, strict=True):
            yield holder, contents, holder.read()


def _is_same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is bytes and type(b) is bytes and a == b)  # the values of an array
