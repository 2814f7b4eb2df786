"""Encodes the values that graphs and arguments contain as JSON, with a tag for each type.

Decoding makes values of known types only. Classes are saved by name, and looked up among those that
are already imported: reading an artifact imports nothing and calls nothing that the file names.
"""

from __future__ import annotations

import enum
import math
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch.fx.immutable_collections import immutable_dict, immutable_list

from pabc.artifact.errors import ArtifactError
from pabc.base.structure import DataclassForm, Structure
from pabc.internals import pytree
from pabc.passes import (
    Attention,
    Axis,
    Denoised,
    Factor,
    Marked,
    Region,
    ResultForm,
    ResultLayout,
    ShardedAxis,
    Shards,
    Signature,
    TensorCall,
)

Json = Any
"""A value as `json.loads` returns it."""
_CONTAINERS = {c.__name__: c for c in (list, tuple, dict, OrderedDict, defaultdict, deque)}
_FACTS = {
    c.__name__: c
    for c in (Attention, Axis, DataclassForm, Denoised, Factor, Marked, Region, ResultForm)
    + (ResultLayout, ShardedAxis, Shards, Signature, Structure, TensorCall)
}
"""The compiler's own dataclasses, written field by field."""
_TORCH_TYPES: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}
"""Types whose values are attributes of `torch`."""


def encode(value: Any) -> Json:
    """Returns a value as JSON. Raises: :class:`ArtifactError` if its type is not supported."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) in (list, immutable_list):
        return [encode(item) for item in value]
    if type(value) in _WRITERS:
        tag, write = _WRITERS[type(value)]
        return {tag: write(value)}
    if isinstance(value, enum.Enum):
        return {"enum": [_name_class(type(value)), value.name]}
    if isinstance(value, pytree.TreeSpec):
        return {"spec": _write_spec(value)}
    if isinstance(value, type):
        return {"class": _name_class(value)}
    if _FACTS.get(type(value).__name__) is type(value):
        parts = {f.name: encode(getattr(value, f.name)) for f in fields(value)}
        return {"fact": [type(value).__name__, parts]}
    raise ArtifactError(
        f"expected data that can be saved, found a {type(value).__qualname__}: {value!r:.80}"
    )


def decode(content: Json) -> Any:
    """Returns the value that :func:`encode` wrote. Raises: :class:`ArtifactError` otherwise."""
    if content is None or isinstance(content, (bool, int, str)):
        return content
    if isinstance(content, list):
        return [decode(item) for item in content]
    if isinstance(content, dict) and len(content) == 1:
        ((tag, inner),) = content.items()
        if tag in _READERS:
            return _READERS[tag](inner)
    raise ArtifactError(f"artifact: expected a value as pabc writes it, found {content!r:.80}")


def find_class(name: str) -> type:
    """Returns the imported class of this name, which must be one of data.

    Raises: :class:`ArtifactError` if it is not imported, or is not a container, dataclass, named
    tuple or enum.
    """
    if name in _CONTAINERS:
        return _CONTAINERS[name]
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        raise ArtifactError(f"class {name}: expected it to be imported; import {module} first")
    if not _is_data(found):
        raise ArtifactError(f"class {name}: expected a dataclass, named tuple, enum or container")
    return found


def _name_class(kind: type) -> str:
    if _CONTAINERS.get(kind.__name__) is kind:
        return kind.__name__
    name = f"{kind.__module__}:{kind.__qualname__}"
    try:
        found = find_class(name)
    except ArtifactError as error:
        raise ArtifactError(f"expected data that can be saved, found {error}") from None
    if found is not kind:
        raise ArtifactError(
            f"expected data that can be saved, found class {name}, whose name now means another"
        )
    return name


def _is_data(kind: type) -> bool:
    is_named_tuple = issubclass(kind, tuple) and hasattr(kind, "_fields")
    is_registered = kind in pytree.SUPPORTED_NODES
    return is_dataclass(kind) or is_named_tuple or is_registered or issubclass(kind, enum.Enum)


def _write_float(value: float) -> Json:
    return value.hex() if math.isfinite(value) else repr(value)


def _read_float(content: Json) -> float:
    return float.fromhex(content)  # accepts inf and nan, too


def _write_spec(spec: pytree.TreeSpec) -> Json:
    if spec.is_leaf():
        return None
    return [encode(spec.type), encode(spec.context), [_write_spec(c) for c in spec.children()]]


def _read_spec(content: Json) -> pytree.TreeSpec:
    if content is None:
        return pytree.tree_structure(0)
    kind, context, children = content
    kind = decode(kind)
    if kind not in pytree.SUPPORTED_NODES:
        raise ArtifactError(f"artifact: expected a container, found {kind}")
    return pytree.TreeSpec(kind, decode(context), [_read_spec(child) for child in children])


def _read_enum(content: Json) -> enum.Enum:
    kind, name = content
    found = find_class(kind)
    if not issubclass(found, enum.Enum) or name not in found.__members__:
        raise ArtifactError(f"artifact: expected a member of the enum {kind}, found {name!r}")
    return found[name]


def _read_named(kind: type) -> Callable[[Json], Any]:
    def read(name: Json) -> Any:
        value = getattr(torch, name, None)
        if not isinstance(value, kind):
            raise ArtifactError(f"artifact: expected a {kind.__name__}, found torch.{name}")
        return value

    return read


def _read_fact(content: Json) -> Any:
    name, parts = content
    return _FACTS[name](**{field: decode(part) for field, part in parts.items()})


def _write_items(value: dict[Any, Any]) -> Json:
    return [[encode(key), encode(item)] for key, item in value.items()]


def _read_items(content: Json) -> dict[Any, Any]:
    return {decode(key): decode(item) for key, item in content}


def _strip(value: Any) -> str:
    return str(value).removeprefix("torch.")


_WRITERS: dict[type, tuple[str, Callable[[Any], Json]]] = {
    float: ("float", _write_float),
    complex: ("complex", lambda z: [_write_float(z.real), _write_float(z.imag)]),
    torch.Size: ("size", list),
    tuple: ("tuple", lambda items: list(map(encode, items))),
    frozenset: ("frozenset", lambda items: list(map(encode, items))),
    dict: ("dict", _write_items),
    immutable_dict: ("dict", _write_items),
    slice: ("slice", lambda s: [encode(s.start), encode(s.stop), encode(s.step)]),
    range: ("range", lambda r: [r.start, r.stop, r.step]),
    torch.device: ("device", str),
    type(...): ("ellipsis", lambda _: True),
    **{kind: (tag, _strip) for tag, kind in _TORCH_TYPES.items()},
}
_READERS: dict[str, Callable[[Json], Any]] = {
    "enum": _read_enum,
    "float": _read_float,
    "complex": lambda parts: complex(*map(_read_float, parts)),
    "size": torch.Size,
    "spec": _read_spec,
    "dict": _read_items,
    "slice": lambda parts: slice(*map(decode, parts)),
    "range": lambda parts: range(*parts),
    "device": torch.device,
    "ellipsis": lambda _: ...,
    "class": find_class,
    "fact": _read_fact,
    "tuple": lambda items: tuple(map(decode, items)),
    "frozenset": lambda items: frozenset(map(decode, items)),
    **{tag: _read_named(kind) for tag, kind in _TORCH_TYPES.items()},
}
