"""structure: nested containers as flat leaves, and the form that rebuilds them.

PyTorch's pytree does not know a user's own dataclasses, and to register them would change how the
user's whole program sees them. Here a dataclass is taken apart, and rebuilt, without registration.
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

from pabc.internals import pytree


@dataclass(frozen=True)
class Structure:
    """The containers around leaves; hashable, and equal for calls of the same form.

    Attributes:
        spec: PyTorch's own, in which every dataclass is a leaf.
        records: one entry per leaf of `spec`: the form of the dataclass there, or None where there
            is a plain value.
    """

    spec: pytree.TreeSpec
    records: tuple[DataclassForm | None, ...]

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.spec, self.records))

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """Returns the containers around `leaves`: the inverse of :func:`flatten`."""
        return self._build(leaves, as_records=True)

    def unflatten_plain(self, leaves: Sequence[Any]) -> Any:
        """Returns the same with a dictionary in place of each dataclass, for PyTorch's pytree."""
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
        """The number of leaves that :meth:`unflatten` takes."""
        return sum(1 if r is None else r.contents.num_leaves for r in self.records)


@dataclass(frozen=True)
class DataclassForm:
    """The form of a dataclass instance.

    Attributes:
        kind: its class.
        attributes: the names of its attributes.
        keys: its keys, where the class is a dictionary too.
        contents: the structure of a dictionary of the attributes and then the items.
    """

    kind: type
    attributes: tuple[str, ...]
    keys: tuple[Any, ...]
    contents: Structure

    def build(self, contents: dict[str, Any]) -> Any:
        """Returns an instance with these contents, without running `__init__`: what that would
        derive is among the contents."""
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
    """Returns the leaves of nested containers and dataclasses, and their structure."""
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


def _is_record(value: Any) -> bool:
    return (
        dataclasses.is_dataclass(value)
        and not isinstance(value, (type, torch.Tensor, nn.Module))
        and type(value) not in pytree.SUPPORTED_NODES
    )


def _attributes(record: Any) -> dict[str, Any]:
    """Returns an instance's fields, and what else was set on it."""
    names = [field.name for field in dataclasses.fields(record)]
    fields = {name: getattr(record, name) for name in names if hasattr(record, name)}
    return fields | getattr(record, "__dict__", {})


def holds_tensors(leaf: Any) -> bool:
    """Returns True if an object has tensors among its attributes, so that it can be no constant."""
    held = pytree.tree_leaves(getattr(leaf, "__dict__", None))
    return not isinstance(leaf, type) and any(isinstance(x, torch.Tensor) for x in held)
