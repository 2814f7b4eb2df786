"""What rules give, and how they write a kernel's call into a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from ..ir import is_call, is_random, value

BEFORE = "laid_out_before"
"""In `meta` of a node: what took its place was laid out like this."""


@dataclass(frozen=True, slots=True)
class Match:
    """What a kernel might compute.

    Attributes:
        kernel: its name, as in `pabc.kernels`.
        shape: what its gains are measured by, see :mod:`pabc.kernels.gains`.
        reason: why it cannot compute this; None: it can.
        rewrite: writes the call of the kernel, after which nothing needs the node.
        covers: nodes before it that the kernel would compute too.
    """

    kernel: str
    shape: tuple[int, ...]
    reason: str | None
    rewrite: Callable[[], None]
    covers: tuple[Node, ...] = ()


Rule = Callable[[Node], Match | None]
"""A node -> what a kernel might compute that ends there, if it does."""


def first_reason(reasons: dict[str, bool]) -> str | None:
    """The first reason that holds."""
    return next((reason for reason, holds in reasons.items() if holds), None)


def insert(before: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A call before another node, which it takes its slot of, with what it yields in `"val"`."""
    with before.graph.inserting_before(before):
        made = before.graph.call_function(target, args, kwargs)
    made.meta = {key: before.meta[key] for key in ("slot",) if key in before.meta}
    given, named = map_arg((args, kwargs), lambda n: n.meta["val"])
    made.meta["val"] = target(*given, **named)
    return made


def replace(node: Node, by: Node, *, unless: Node | None = None) -> None:
    """Has all users of a node, but for one, take another one of the same shape.

    Where that is laid out in another way, :data:`BEFORE` says how it was: who comes after may take
    it for granted (:func:`~pabc.passes.lowering.layouts.keep_layouts`).
    """
    wanted, found = value(node), value(by)
    assert wanted.shape == found.shape and wanted.dtype == found.dtype, (node, by)
    if steps(wanted) != steps(found):
        by.meta[BEFORE] = node.meta.get(BEFORE, wanted)
    node.replace_all_uses_with(by, delete_user_cb=lambda user: user is not unless)


def steps(val: torch.Tensor) -> list[int]:
    """The strides of the dimensions in which there are steps."""
    return [stride for size, stride in zip(val.shape, val.stride(), strict=True) if size != 1]


def restride(node: Node, by: Node, wanted: torch.Tensor) -> Node:
    """`by`, copied before a node to the strides of `wanted`, which has no gaps."""
    strides = wanted.stride()
    order = sorted(range(wanted.ndim), key=lambda d: (-strides[d], d))
    permuted = insert(node, torch.ops.aten.permute.default, by, order)
    copied = insert(
        node, torch.ops.aten.clone.default, permuted, memory_format=torch.contiguous_format
    )
    back = [order.index(d) for d in range(wanted.ndim)]
    return insert(node, torch.ops.aten.permute.default, copied, back)


def only_user(node: Node) -> Node | None:
    """The one node that reads another one; None where there are more."""
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def operands(node: Node, target: Any) -> tuple[Any, ...] | None:
    """The arguments of a call of an op without keywords; None: it is no such call."""
    return tuple(node.args) if is_call(node, (target,)) and not node.kwargs else None


def are_same(a: Any, b: Any) -> bool:
    """Whether two arguments are of one value: the same node, or the same call of the same."""
    if isinstance(a, Node) and isinstance(b, Node):
        if a is b:
            return True
        if a.op != "call_function" or a.target is not b.target or is_random(a):
            return False
        return are_same((a.args, a.kwargs), (b.args, b.kwargs))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(are_same, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(are_same(a[key], b[key]) for key in a)
    return type(a) is type(b) and bool(a == b)
