"""arguments: one form for all ways to write a call, and what a graph takes of it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch

from pabc.base.numbers import as_tensor
from pabc.base.structure import flatten, holds_tensors
from pabc.internals import pytree

Bound = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional arguments, and those by keyword."""


def bind_arguments(
    signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Bound:
    """Returns the call in one spelling: positional where possible, defaults filled in."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.args, bound.kwargs


def bind_call(forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Bound:
    """Returns the arguments that `forward` is traced with: in one spelling, or as written if the
    forward can tell spellings apart."""
    signature = inspect.signature(forward)
    if sees_spelling(forward):
        return tuple(args), in_order(signature, kwargs)
    return bind_arguments(signature, args, kwargs)


def in_order(signature: inspect.Signature, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns keywords in the signature's order, as torch.export expects them; others follow."""
    own = {name: kwargs[name] for name in signature.parameters if name in kwargs}
    return own | dict(kwargs)


def sees_spelling(forward: Callable[..., Any]) -> bool:
    """Returns True if a forward can tell `f(x, 2)` from `f(x, t=2)`: it is decorated, or is no
    plain function, whose parameters are the same however they were given."""
    function = forward.__func__ if isinstance(forward, MethodType) else forward
    plain = isinstance(function, FunctionType)
    return not plain or hasattr(function, "__wrapped__") or hasattr(function, "__signature__")


def leaf_key(leaf: Any) -> Any:
    """Returns what a captured graph is specialized on of one flattened argument: the layout of a
    tensor, else the value."""
    if isinstance(leaf, torch.Tensor):
        return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
    if isinstance(leaf, float):
        return (type(leaf), leaf, math.copysign(1.0, leaf))
    return (type(leaf), leaf)


def pack(leaves: Sequence[Any], lifted: Collection[int] = ()) -> list[Any]:
    """Returns a graph's inputs from flattened arguments.

    Numbers at the positions `lifted` become tensors. A constant that a tracer may not know
    becomes None.
    """
    known = (torch.Tensor, int, float, str)
    return [
        as_tensor(leaf) if i in lifted else leaf if isinstance(leaf, known) else None
        for i, leaf in enumerate(leaves)
    ]


def check_constants(arguments: Bound, leaves: Sequence[Any], names: Sequence[str]) -> None:
    """Raises `TypeError` for an argument that is neither a tensor nor a possible constant.

    A constant is compared at each call, so it must have a hash, and must hold no tensors, which
    may change. `names` are the parameters of the model's forward.
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


def _leaf_name(arguments: Bound, index: int, names: Sequence[str]) -> str:
    """Returns the argument that a leaf is in, and the path to it within that argument."""
    leaves, structure = flatten(arguments)
    paths = pytree.tree_flatten_with_path(structure.unflatten_plain(leaves))[0]
    _, first, *rest = paths[index][0]
    if isinstance(first, pytree.SequenceKey):
        name: Any = names[first.idx] if first.idx < len(names) else first.idx
    else:
        name = getattr(first, "key", first)
    return f"{name}{pytree.keystr(tuple(rest))}"
