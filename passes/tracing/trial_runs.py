"""trial_runs: runs a model a few times to see its side effects."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from pabc.internals import pytree
from pabc.internals.tensors import version_of

from .calls import TracedCall
from .frozen import Same
from .holders import MISSING, Change, Holder
from .patch import patched
from .python_state import Snapshot
from .untouched import SavedWrites

_CLOSE = 1e-3
"""The largest difference of equal results, relative to the largest value: kernels need not add in
the same order twice."""


class TrialRuns:
    """The side effects of three runs of the model, by name.

    Attributes:
        writers: per name, the innermost modules in whose forwards it was written.
    """

    def __init__(self, model: nn.Module, call: TracedCall, names: Collection[str]) -> None:
        self.writers: dict[str, set[str]] = {}
        self._model, self._call, self._names = model, call, names
        self._of_inputs: set[str] = set()
        self._snapshot = Snapshot.of(model, values="all")
        self._held = [h for h in self._snapshot.holders if any(n.startswith(h.path) for n in names)]
        leaves = call.leaves
        saved = SavedWrites(self._snapshot.tensors(registered=True))
        with torch.no_grad(), saved:
            try:
                with self._watching():
                    self._first = self._run(leaves)
                self._second = self._run(leaves)
                self._restore(saved)
                self._third = self._try([other_values(leaf) for leaf in leaves])
            finally:
                self._restore(saved)

    def _restore(self, saved: SavedWrites) -> None:
        self._snapshot.restore()
        saved.restore()

    @property
    def repeat(self) -> bool:
        """True if the second run gave the same result as the first."""
        return _alike(self._first[0], self._second[0])

    def harmful(self) -> set[str]:
        """Returns the names whose values tell one call from another."""
        (_, first), (_, second) = self._first, self._second
        if not self.repeat:
            return set(self._names)
        third = {} if self._third is None else self._third[1]
        names = dict.fromkeys((*first, *second, *third, *self._names))
        differing = (
            name
            for name in names
            if not _alike(first.get(name), second.get(name))
            or not _alike(first.get(name), third.get(name))
        )
        return {*differing, *self._of_inputs}

    def _run(self, leaves: Sequence[Any]) -> tuple[list[Any], dict[str, list[Any]]]:
        """Returns the leaves of the result, and those of the changed values under each name."""
        given = [copied(leaf) for leaf in leaves]
        memory = {t.untyped_storage().data_ptr() for t in given if isinstance(t, torch.Tensor)}
        stance = torch.compiler.set_stance("force_eager")  # modes would be compiled with it
        with stance, torch.random.fork_rng(devices_of(self._call.tensors)):
            result = self._call.run(given)
        left = {compared_name(c): _value(c) for c in self._snapshot.changes()}
        for name, values in left.items():
            tensors = (t for t in values if isinstance(t, torch.Tensor) and t.numel())
            if any(t.untyped_storage().data_ptr() in memory for t in tensors):
                self._of_inputs.add(name)
        return copies(_leaves(result)), {name: copies(values) for name, values in left.items()}

    def _try(self, leaves: Sequence[Any]) -> tuple[list[Any], dict[str, list[Any]]] | None:
        """Runs with inputs that the model may refuse; returns None if it does."""
        try:
            return self._run(leaves)
        except Exception:
            return None

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """While active, records in `writers` which module's forward writes what."""
        within: list[set[str]] = [set()]
        """Per active call, the names that modules within it have written."""

        def watch(path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            before = self._read()
            within.append(set())
            result = forward(*args, **kwargs)
            after = self._read()
            inner = within.pop()
            for name in {**before, **after}:
                if name not in inner and before.get(name, MISSING) != after.get(name, MISSING):
                    self.writers.setdefault(name, set()).add(path)
                    inner.add(name)
            within[-1].update(inner)
            return result

        with ExitStack() as stack:
            for path, module in self._model.named_modules():
                if path:
                    stack.enter_context(patched(module, partial(watch, path, module.forward)))
            yield

    def _read(self) -> dict[str, Any]:
        """Returns a mark per name that differs once the value was written to."""
        found: dict[str, Any] = {}
        for holder in self._held:
            contents = holder.read()
            if holder.kind == "container":
                found[_name_of_container(holder)] = [_mark(x) for x in contents.values()]
            elif holder.kind == "array":
                found[holder.path] = contents[""]
            else:
                found.update((holder.name_of(k), _mark(value)) for k, value in contents.items())
        return {name: value for name, value in found.items() if name in self._names}


def _value(change: Change) -> list[Any]:
    """Returns the leaves of the value that is compared under :func:`compared_name`."""
    holder = change.holder
    return _leaves(holder.read() if holder.kind == "container" else change.new)


def _mark(value: Any) -> Any:
    """Returns a mark that differs once a value was replaced, or a tensor written to."""
    is_tensor = isinstance(value, torch.Tensor) and not value.is_inference()
    return Same(value), version_of(value) if is_tensor else 0


def devices_of(tensors: Sequence[torch.Tensor]) -> list[torch.device]:
    """Returns the CUDA devices of tensors, whose random states a run may change."""
    return list({t.device for t in tensors if t.is_cuda})


def other_values(leaf: Any) -> Any:
    """Returns other floating-point values; what may be an index, a mask or a setting stays."""
    if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
        return leaf * (0.5 + torch.rand_like(leaf, dtype=torch.float32)).to(leaf.dtype)
    return leaf


def copied(value: Any) -> Any:
    """Returns a copy that later runs do not write to."""
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def copies(values: Sequence[Any]) -> list[Any]:
    """Returns copies of values that later runs do not write to."""
    return list(map(copied, values))


def _leaves(value: Any, depth: int = 0) -> list[Any]:
    """Returns the tensors and other values in a value, with those of objects to some depth."""
    found = []
    for leaf in pytree.tree_leaves(value):
        own = getattr(leaf, "__dict__", None)
        if isinstance(own, dict) and not isinstance(leaf, (torch.Tensor, type)) and depth < 3:
            found += [type(leaf), *own, *_leaves(dict(own), depth + 1)]
        else:
            found.append(leaf)
    return found


def _alike(a: Sequence[Any] | None, b: Sequence[Any] | None) -> bool:
    """Returns True if two lists of values are equal up to rounding, or both are None."""
    if a is None or b is None:
        return a is b
    return len(a) == len(b) and all(map(_equal, a, b))


def _equal(a: Any, b: Any) -> bool:
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return a is b or (type(a) is type(b) and not isinstance(a, torch.Tensor) and bool(a == b))
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if not a.is_floating_point() or torch.equal(a, b):
        return torch.equal(a, b)
    scale = max(a.abs().max().item(), b.abs().max().item())
    return bool(torch.allclose(a.float(), b.float(), rtol=0, atol=_CLOSE * scale, equal_nan=True))


def compared_name(change: Change) -> str:
    """Returns the name under which values are compared: containers, which may grow, as a whole."""
    holder = change.holder
    return _name_of_container(holder) if holder.kind == "container" else change.name


def _name_of_container(holder: Holder) -> str:
    return f"{holder.path}[]"
