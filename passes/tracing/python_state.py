"""python_state: what a model's forward can reach beside its tensors, at one time.

Attributes of modules and of the objects they hold, containers, variables that replaced methods and
hooks close over, class attributes, and the globals that the code of all these names
(:mod:`pabc.passes.tracing.walk`). The same list of places serves three questions: what a traced
forward has left behind (:class:`Snapshot`), how that is undone, and whether the model still is as
it was captured (:mod:`pabc.passes.tracing.modules`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

from .holders import MISSING, Change, Holder
from .walk import walk_from

Values = Literal["none", "unregistered", "all"]


class Snapshot:
    """What every holder that is reached from some roots holds at one time.

    Attributes:
        holders: what was reached.
        iterators: paths of objects whose state cannot be seen: iterators, generators of random
            numbers.
    """

    def __init__(
        self, roots: Iterable[tuple[str, str | None, Any]], *, values: Values = "none"
    ) -> None:
        """`roots`: path, module and value of each; see :class:`Holder`.

        `values`: of which tensors the values count as well. `"unregistered"`: of those that are no
        parameters or buffers, which a trace replaces by fake ones; they are restored. `"all"`: of
        all, which :class:`SavedWrites` restores.
        """
        walk = walk_from(roots)
        self.holders, self.iterators = walk.holders, walk.iterators
        self._contents = [holder.read() for holder in self.holders]
        self._versions: dict[int, tuple[torch.Tensor, int]] = {}
        self._values: list[tuple[torch.Tensor, int, torch.Tensor]] = []
        if values == "all":
            self._versions = {id(t): (t, t._version) for t in self.tensors(registered=True)}
        elif values == "unregistered":
            tensors = self.tensors(registered=False)
            self._values = [(t, t._version, t.detach().clone()) for t in tensors]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        arguments: Mapping[str, Any] | None = None,
        *,
        values: Values = "none",
    ) -> Snapshot:
        """All that a call of the model with these arguments can reach."""
        given = ((f"argument {name}", None, x) for name, x in (arguments or {}).items())
        return cls([("", "", model), *given], values=values)

    def changes(self) -> list[Change]:
        """What is not as it was."""
        return [
            Change(holder, key, old.get(key, MISSING), now.get(key, MISSING))
            for holder, old, now in self._read()
            for key in {**old, **now}
            if not _is_same(old.get(key, MISSING), now.get(key, MISSING))
            or self._is_written(now.get(key))
        ]

    def restore(self) -> None:
        """Makes everything as it was; what has not changed is not written to."""
        for holder, old, now in self._read():
            if old.keys() != now.keys() or not all(_is_same(now[key], old[key]) for key in old):
                holder.write(old)
        for tensor, version, value in self._values:
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(value)

    def _is_written(self, value: Any) -> bool:
        """Whether a tensor has other values than it had."""
        known = self._versions.get(id(value))
        return known is not None and known[0]._version != known[1]

    def tensors(self, *, registered: bool) -> Iterator[torch.Tensor]:
        """Yields the tensors that are held; `registered`: parameters and buffers as well."""
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
