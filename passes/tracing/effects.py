"""effects: what a forward leaves behind beside its result, and whether that matters.

A graph computes results alone. Tables that a model builds at its first call are no loss. A counter,
a residual that the next call reads, an object that collects attention maps are: without them the
model would silently do something else. A trace shows what is left behind; running the model tells
which kind it is, and which module does it.
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

from .calls import Call
from .frozen import Same
from .holders import MISSING, Change, Holder, HolderKind
from .outside import patched
from .python_state import Snapshot
from .untouched import SavedWrites

_CLOSE = 1e-3
"""How far two floating-point results of the same computation may lie apart, relative to the
largest: kernels need not add in the same order twice."""
Name = tuple[tuple[str, HolderKind], Hashable]
"""A holder's place, and the key of what it holds; None: all of it."""


@dataclass(frozen=True)
class Effects:
    """What becomes of the things that a forward leaves behind.

    Attributes:
        written: the names: what they stand for tells nothing about the state of the model.
        modules: module -> why it cannot be part of a graph.
        deleted: of which argument, by the keys that lead to a container in it, which key is taken
            out at each call.
    """

    written: tuple[Name, ...] = ()
    modules: Mapping[str, str] = field(default_factory=dict)
    deleted: tuple[tuple[Any, ...], ...] = ()


def judge_effects(model: nn.Module, call: Call, outside: Mapping[str, str]) -> Effects:
    """Returns what follows from `call.left`, the changes that the last trace made.

    `outside`: modules that were not part of the trace. The model runs three times, and is then as
    it was: twice with the arguments of the call, to see whether the second run is like the first,
    and once with others, to see what follows from them.

    Raises: ValueError where the model's own forward, rather than a module in it, keeps something
    from one call to the next, or writes to what it was passed; it names what.
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
            writers = runs.writers.get(_key(change), set()) - outside.keys()
            if not writers:
                raise ValueError(_describe(model, change))
            reason = f"it keeps {change.name} from one call to the next"
            modules.update((path, modules.get(path, reason)) for path in writers)
    return Effects(tuple(map(_name, left)), modules, deleted)


def find_written_tensors(
    model: nn.Module, call: Call, outside: Mapping[str, str]
) -> dict[str, str]:
    """Returns the modules that write to tensors which they, or others, hold, and why that keeps
    them out of a graph; a trace stops at such a write. The model itself is none of them."""
    snapshot = Snapshot.of(model, values="all")
    names = {holder.name_of(k) for holder in snapshot.holders for k in _tensors_in(holder)}
    try:
        runs = _Runs(model, call, names)
    except Exception:  # whatever stopped the trace may stop this as well
        return {}
    return {
        path: f"it writes to {name}"
        for name, paths in runs.writers.items()
        for path in paths - outside.keys()
    }


def _tensors_in(holder: Holder) -> list[Any]:
    return [key for key, value in holder.read().items() if isinstance(value, torch.Tensor)]


def _key(change: Change) -> str:
    """What is compared: a container as a whole, which may grow at each call."""
    holder = change.holder
    return _key_of_container(holder) if holder.kind == "container" else change.name


def _key_of_container(holder: Holder) -> str:
    return f"{holder.path}[]"


def _describe(model: nn.Module, change: Change) -> str:
    return (
        f"{type(model).__name__}: expected a forward that keeps nothing from one call to the next, "
        f"found that it changes {change.name}, from {_short(change.old)} to {_short(change.new)}; "
        "keep such state outside of the model, or in a module of its own, which then runs as it is"
    )


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"


def _name(change: Change) -> Name:
    """A container that gains entries, as a table by sizes does, may gain others."""
    place = change.holder.path, change.holder.kind
    return place, None if change.holder.kind == "container" else change.key


# ---- arguments ----


def _is_argument(change: Change) -> bool:
    return change.holder.path.startswith("argument ")


def _check_arguments(model: nn.Module, call: Call) -> tuple[tuple[Any, ...], ...]:
    """Refuses what is written to arguments, but for keys that are taken out of dictionaries."""
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


def check_writes(call: Call, positions: Sequence[int], names: Sequence[str]) -> None:
    """Raises ValueError unless the forward writes to inputs what every call writes alike: padding,
    say, whatever the other inputs are, and nothing new at a second call.

    `positions`: of these inputs among the flattened arguments.
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
    """What runs of the model leave behind, by name.

    Attributes:
        writers: name -> the innermost modules in whose forwards it was written.
    """

    def __init__(self, model: nn.Module, call: Call, names: Collection[str]) -> None:
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
        """Whether the second run gave what the first one gave."""
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
        """The leaves of the result, and of what is left under each name."""
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
        """A run with inputs that the model may refuse."""
        try:
            return self._run(leaves)
        except Exception:
            return None

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """While active, notes which module's forward writes what."""
        within: list[set[str]] = [set()]
        """Per call under way, the names that modules within it have written."""

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
        """Something per name that is another when that was written to."""
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
    """The leaves of what is compared under :func:`_key`."""
    holder = change.holder
    return _leaves(holder.read() if holder.kind == "container" else change.new)


def _mark(value: Any) -> Any:
    """Something that is another one when a value was replaced, or a tensor written to."""
    is_tensor = isinstance(value, torch.Tensor) and not value.is_inference()
    return Same(value), value._version if is_tensor else 0


def _devices(tensors: Sequence[torch.Tensor]) -> list[torch.device]:
    return list({t.device for t in tensors if t.is_cuda})


def _other(leaf: Any) -> Any:
    """Other values of the same kind; what may be an index, a mask or a setting stays."""
    if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
        return leaf * (0.5 + torch.rand_like(leaf, dtype=torch.float32)).to(leaf.dtype)
    return leaf


def _copy(value: Any) -> Any:
    """A value that later runs do not write to."""
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _copies(values: Sequence[Any]) -> list[Any]:
    return list(map(_copy, values))


def _leaves(value: Any, depth: int = 0) -> list[Any]:
    """What a value holds: tensors, and other values."""
    found = []
    for leaf in pytree.tree_leaves(value):
        own = getattr(leaf, "__dict__", None)
        if isinstance(own, dict) and not isinstance(leaf, (torch.Tensor, type)) and depth < 3:
            found += [type(leaf), *own, *_leaves(dict(own), depth + 1)]
        else:
            found.append(leaf)
    return found


def _alike(a: Sequence[Any] | None, b: Sequence[Any] | None) -> bool:
    """Whether two lists of values are the same, up to rounding; None: there are none."""
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
