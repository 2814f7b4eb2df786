"""effects: judges the side effects of a forward.

A graph computes results alone. To lose a table that a model builds at its first call is harmless.
To lose a counter, a residual that the next call reads, or an object that collects attention maps
would silently change what the model does. A trace shows the side effects; running the model tells
the harmful ones, and the modules that have them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from .calls import TracedCall
from .frozen import Same
from .holders import MISSING, Change, Holder, HolderKind
from .patch import patched
from .python_state import Snapshot
from .untouched import SavedWrites

_CLOSE = 1e-3
"""The largest difference of equal results, relative to the largest value: kernels need not add in
the same order twice."""
WrittenName = tuple[tuple[str, HolderKind], Hashable]
"""The path and kind of a holder, and a key in it, or None for all of it."""


@dataclass(frozen=True)
class Effects:
    """The side effects of a forward.

    Attributes:
        written: harmless writes: the values of these names are no part of the model's state.
        modules: modules with harmful side effects, each with why it must be opaque.
        deleted: keys that the forward deletes from its arguments, each as a path from
            `(args, kwargs)`.
    """

    written: tuple[WrittenName, ...] = ()
    modules: Mapping[str, str] = field(default_factory=dict)
    deleted: tuple[tuple[Any, ...], ...] = ()


def judge_effects(model: nn.Module, call: TracedCall, opaque: Mapping[str, str]) -> Effects:
    """Judges `call.left`, the changes that the last trace made.

    `opaque` are modules that the trace did not enter. The model runs three times and is then
    restored: twice with the arguments of the call, to see whether a second run gives the same, and
    once with others, to see which changes follow from them.

    Raises: ValueError, naming the change, where the model's own forward, not that of a module in
    it, keeps something from one call to the next, or writes to its arguments.
    """
    deleted = _check_arguments(model, call)
    left = [c for c in call.left if not _is_argument(c)]
    is_virtual = any(t.is_meta or isinstance(t, FakeTensor) for t in call.tensors)
    if is_virtual or not (left or call.iterators):
        return Effects(deleted=deleted)
    runs = _Runs(model, call, set(map(_key, left)))
    if not runs.repeat and not left:
        raise ValueError(
            f"{type(model).__name__}: expected the same result of the same call, found another, "
            f"which follows from {', '.join(call.iterators)}; pass such values as arguments"
        )
    harmful = runs.harmful()
    modules: dict[str, str] = {}
    for change in left:
        if _key(change) in harmful:
            writers = runs.writers.get(_key(change), set()) - opaque.keys()
            if not writers:
                raise ValueError(_describe(model, change))
            reason = f"it keeps {change.name} from one call to the next"
            modules.update((path, modules.get(path, reason)) for path in writers)
    return Effects(tuple(map(_name, left)), modules, deleted)


def find_written_tensors(
    model: nn.Module, call: TracedCall, opaque: Mapping[str, str]
) -> dict[str, str]:
    """Returns the modules, except the model itself, that write to tensors which modules hold, each
    with why it must be opaque: a trace stops at such a write."""
    snapshot = Snapshot.of(model, values="all")
    names = {holder.name_of(k) for holder in snapshot.holders for k in _tensors_in(holder)}
    try:
        runs = _Runs(model, call, names)
    except Exception:  # whatever stopped the trace may stop this as well
        return {}
    return {
        path: f"it writes to {name}"
        for name, paths in runs.writers.items()
        for path in paths - opaque.keys()
    }


def _tensors_in(holder: Holder) -> list[Any]:
    return [key for key, value in holder.read().items() if isinstance(value, torch.Tensor)]


def _key(change: Change) -> str:
    """Returns the name under which values are compared: containers, which may grow, as a whole."""
    holder = change.holder
    return _key_of_container(holder) if holder.kind == "container" else change.name


def _key_of_container(holder: Holder) -> str:
    return f"{holder.path}[]"


def _describe(model: nn.Module, change: Change) -> str:
    return (
        f"{type(model).__name__}: expected a forward that keeps nothing from one call to the next, "
        f"found that it changes {change.name}, from {_short(change.old)} to {_short(change.new)}; "
        "keep such state outside of the model, or in a module of its own, which is then opaque"
    )


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"


def _name(change: Change) -> WrittenName:
    """Returns what was written: of a container, which may gain other entries later, all of it."""
    place = change.holder.path, change.holder.kind
    return place, None if change.holder.kind == "container" else change.key


# ---- arguments ----


def _is_argument(change: Change) -> bool:
    return change.holder.path.startswith("argument ")


def _check_arguments(model: nn.Module, call: TracedCall) -> tuple[tuple[Any, ...], ...]:
    """Returns the keys deleted from dictionaries; refuses all other writes to arguments."""
    deleted = []
    for change in filter(_is_argument, call.left):
        path = call.path_to(change.holder.value)
        if change.new is not MISSING or path is None or change.holder.kind != "container":
            raise ValueError(
                f"{change.name}: expected arguments that forward does not write to, found that "
                f"{type(model).__name__} changes it, from {_short(change.old)} to "
                f"{_short(change.new)}; return it as a result, or run this call on the model itself"
            )
        deleted.append((*path, change.key))
    return tuple(deleted)


def check_writes(call: TracedCall, positions: Sequence[int], names: Sequence[str]) -> None:
    """Raises ValueError unless every call writes the same values to its inputs, such as padding.

    They must not depend on the other inputs, and a second call must change nothing. `positions` are
    those of the inputs among the flattened arguments, `names` their names.
    """
    if any(t.is_meta or isinstance(t, FakeTensor) for t in call.tensors):
        return
    leaves = [_copy(leaf) for leaf in call.leaves]
    others = [leaf if i in positions else _other(leaf) for i, leaf in enumerate(_copies(leaves))]
    with torch.no_grad(), torch.random.fork_rng(_devices(call.tensors)):
        call.run(leaves)
        once = _copies([leaves[i] for i in positions])
        call.run(leaves)
        call.run(others)
    for name, i, value in zip(names, positions, once, strict=True):
        if not torch.equal(value, leaves[i]) or not torch.equal(value, others[i]):
            raise ValueError(
                "pabc expects a forward without side effects, found one that writes to "
                f"{[name]}, another value at each call; move the write out of forward"
            )


# ---- runs ----


class _Runs:
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
                self._third = self._try([_other(leaf) for leaf in leaves])
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
        given = [_copy(leaf) for leaf in leaves]
        memory = {t.untyped_storage().data_ptr() for t in given if isinstance(t, torch.Tensor)}
        stance = torch.compiler.set_stance("force_eager")  # modes would be compiled with it
        with stance, torch.random.fork_rng(_devices(self._call.tensors)):
            result = self._call.run(given)
        left = {_key(c): _value(c) for c in self._snapshot.changes()}
        for name, values in left.items():
            tensors = (t for t in values if isinstance(t, torch.Tensor) and t.numel())
            if any(t.untyped_storage().data_ptr() in memory for t in tensors):
                self._of_inputs.add(name)
        return _copies(_leaves(result)), {name: _copies(values) for name, values in left.items()}

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
                found[_key_of_container(holder)] = [_mark(x) for x in contents.values()]
            elif holder.kind == "array":
                found[holder.path] = contents[""]
            else:
                found.update((holder.name_of(k), _mark(value)) for k, value in contents.items())
        return {name: value for name, value in found.items() if name in self._names}


def _value(change: Change) -> list[Any]:
    """Returns the leaves of the value that is compared under :func:`_key`."""
    holder = change.holder
    return _leaves(holder.read() if holder.kind == "container" else change.new)


def _mark(value: Any) -> Any:
    """Returns a mark that differs once a value was replaced, or a tensor written to."""
    is_tensor = isinstance(value, torch.Tensor) and not value.is_inference()
    return Same(value), value._version if is_tensor else 0


def _devices(tensors: Sequence[torch.Tensor]) -> list[torch.device]:
    return list({t.device for t in tensors if t.is_cuda})


def _other(leaf: Any) -> Any:
    """Returns other floating-point values; what may be an index, a mask or a setting stays."""
    if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
        return leaf * (0.5 + torch.rand_like(leaf, dtype=torch.float32)).to(leaf.dtype)
    return leaf


def _copy(value: Any) -> Any:
    """Returns a copy that later runs do not write to."""
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _copies(values: Sequence[Any]) -> list[Any]:
    return list(map(_copy, values))


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
