"""structure: a call's arguments, or a model's result, as flat leaves and what rebuilds them.

PyTorch's pytree does not know a user's own dataclasses, and to register them would change how the
user's whole program sees them. Here they are taken apart, and put together, on the spot.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Structure:
    """How leaves pack into containers; hashable, equal for calls of the same form.

    `spec` is PyTorch's, with every dataclass a leaf; `records` has one entry per leaf of `spec`:
    how the dataclass there is built, or None where a plain value is.
    """

    spec: pytree.TreeSpec
    records: tuple[DataclassForm | None, ...]

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.spec, self.records))

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """The containers around `leaves`: the inverse of :func:`flatten`."""
        return self._build(leaves, as_records=True)

    def unflatten_plain(self, leaves: Sequence[Any]) -> Any:
        """The same with a dictionary in place of each dataclass: what any pytree can flatten."""
        return self._build(leaves, as_records=False)

    def _build(self, leaves: Sequence[Any], *, as_records: bool) -> Any:
        rest = iter(leaves)
        tops = []
        for record in self.records:
            if record is None:
                tops.append(next(rest))
                continue
            inner = [next(rest) for _ in range(record.contents.num_leaves)]
            contents = record.contents._build(inner, as_records=as_records)
            tops.append(record.build(contents) if as_records else contents)
        return pytree.tree_unflatten(tops, self.spec)

    @property
    def num_leaves(self) -> int:
        """How many leaves :meth:`unflatten` takes."""
        return sum(1 if r is None else r.contents.num_leaves for r in self.records)


@dataclass(frozen=True)
class DataclassForm:
    """A dataclass instance: `contents` is the structure of a dictionary, of its attributes first
    and, where the class is a dictionary too, of its items, whose keys are `keys`."""

    kind: type
    attributes: tuple[str, ...]
    keys: tuple[Any, ...]
    contents: Structure

    def build(self, contents: dict[str, Any]) -> Any:
        """Sets what was there and runs no `__init__`: what that derived is among the leaves."""
        kind: Any = self.kind
        record = kind.__new__(kind)
        values = list(contents.values())
        count = len(self.attributes)
        for name, value in zip(self.attributes, values[:count], strict=True):
            object.__setattr__(record, name, value)
        base = OrderedDict if issubclass(self.kind, OrderedDict) else dict
        for key, value in zip(self.keys, values[count:], strict=True):
            base.__setitem__(record, key, value)
        return record


def flatten(tree: Any) -> tuple[list[Any], Structure]:
    """The leaves of nested containers, dataclasses among them, and their structure."""
    tops, spec = pytree.tree_flatten(tree, is_leaf=_is_record)
    leaves: list[Any] = []
    records: list[DataclassForm | None] = []
    for top in tops:
        if not _is_record(top):
            leaves.append(top)
            records.append(None)
            continue
        attributes, items = _attributes(top), dict(top) if isinstance(top, dict) else {}
        named = {f"item_{i}": value for i, value in enumerate(items.values())}
        inner, contents = flatten({**attributes, **named})
        leaves.extend(inner)
        records.append(DataclassForm(type(top), tuple(attributes), tuple(items), contents))
    return leaves, Structure(spec, tuple(records))


def check_constants(
    arguments: tuple[Any, Any], leaves: Sequence[Any], names: Sequence[str]
) -> None:
    """Raises `TypeError` for an argument that is no tensor, nor can be a constant of a graph.

    `arguments`: the positional ones and those by keyword; `names`: the model's parameters.

    A constant is compared at each call: it has a hash, and no tensors that may change within it.
    """
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, (torch.Tensor, int, float, str, type(None))):
            continue
        if holds_tensors(leaf):
            problem = "holds tensors: pass these as arguments, or in containers or dataclasses"
        elif not _has_hash(leaf):
            problem = "is compared by value at each call and has no hash"
        else:
            continue
        name = _leaf_name(arguments, i, names)
        raise TypeError(f"argument {name}: the {type(leaf).__name__} {problem}")


def _has_hash(leaf: Any) -> bool:
    try:
        hash(leaf)
    except TypeError:
        return False
    return True


def _leaf_name(arguments: tuple[Any, Any], index: int, names: Sequence[str]) -> str:
    """The argument that a leaf is in, and where in it."""
    leaves, structure = flatten(arguments)
    paths = pytree.tree_flatten_with_path(structure.unflatten_plain(leaves))[0]
    _, first, *rest = paths[index][0]
    if isinstance(first, pytree.SequenceKey):
        name: Any = names[first.idx] if first.idx < len(names) else first.idx
    else:
        name = getattr(first, "key", first)
    return f"{name}{pytree.keystr(tuple(rest))}"


def _is_record(value: Any) -> bool:
    return (
        dataclasses.is_dataclass(value)
        and not isinstance(value, (type, torch.Tensor, nn.Module))
        and type(value) not in pytree.SUPPORTED_NODES
    )


def _attributes(record: Any) -> dict[str, Any]:
    """What an instance holds: its fields, and what else was set on it."""
    names = [field.name for field in dataclasses.fields(record)]
    fields = {name: getattr(record, name) for name in names if hasattr(record, name)}
    return fields | getattr(record, "__dict__", {})


def holds_tensors(leaf: Any) -> bool:
    """Whether an object has tensors among its attributes: a constant it cannot be."""
    held = pytree.tree_leaves(getattr(leaf, "__dict__", None))
    return not isinstance(leaf, type) and any(isinstance(x, torch.Tensor) for x in held)
