"""Matches, which rules return, and the edits with which they insert calls of kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from ..ir import is_call, is_random, value

BEFORE = "laid_out_before"
"""Key of `node.meta`: the fake tensor that the node replaces, where its layout differs."""


@dataclass(frozen=True, slots=True)
class Match:
    """A part of a graph, ending in one node, that a kernel might compute.

    Attributes:
        kernel: the name of the kernel in `pabc.kernels`.
        shape: the sizes by which its gains are looked up, see :mod:`pabc.kernels.gains`.
        reason: why the kernel can't compute it; None if it can.
        rewrite: inserts the call of the kernel, after which nothing uses the node.
        covers: other nodes that the kernel would compute too.
    """

    kernel: str
    shape: tuple[int, ...]
    reason: str | None
    rewrite: Callable[[], None]
    covers: tuple[Node, ...] = ()


KernelRule = Callable[[Node], Match | None]
"""Returns what its kernel might compute that ends in a node; None if there is nothing."""


def first_reason(reasons: dict[str, bool]) -> str | None:
    """Returns the first reason that holds."""
    return next((reason for reason, holds in reasons.items() if holds), None)


def insert(before: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """Inserts a call before a node, with the slot of that node and the fake result in `meta`."""
    with before.graph.inserting_before(before):
        made = before.graph.call_function(target, args, kwargs)
    made.meta = {key: before.meta[key] for key in ("slot",) if key in before.meta}
    given, named = map_arg((args, kwargs), lambda n: n.meta["val"])
    made.meta["val"] = target(*given, **named)
    return made


def replace(node: Node, by: Node, *, unless: Node | None = None) -> None:
    """Replaces all uses of `node`, except in `unless`, by another node of the same shape.

    If the strides differ, :data:`BEFORE` keeps the former ones, which users may rely on;
    :func:`~pabc.passes.lowering.layouts.keep_layouts` settles that.
    """
    wanted, actual = value(node), value(by)
    assert wanted.shape == actual.shape and wanted.dtype == actual.dtype, (node, by)
    if steps(wanted) != steps(actual):
        by.meta[BEFORE] = node.meta.get(BEFORE, wanted)
    node.replace_all_uses_with(by, delete_user_cb=lambda user: user is not unless)


def steps(val: torch.Tensor) -> list[int]:
    """Returns the strides of all dimensions but those of size 1."""
    return [stride for size, stride in zip(val.shape, val.stride(), strict=True) if size != 1]


def restride(node: Node, by: Node, wanted: torch.Tensor) -> Node:
    """Inserts a copy of `by` before a node, with the strides of `wanted`, which has no gaps."""
    strides = wanted.stride()
    order = sorted(range(wanted.ndim), key=lambda d: (-strides[d], d))
    permuted = insert(node, torch.ops.aten.permute.default, by, order)
    copied = insert(
        node, torch.ops.aten.clone.default, permuted, memory_format=torch.contiguous_format
    )
    back = [order.index(d) for d in range(wanted.ndim)]
    return insert(node, torch.ops.aten.permute.default, copied, back)


def only_user(node: Node) -> Node | None:
    """Returns the only user of a node; None if it has several or none."""
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def operands(node: Node, target: Any) -> tuple[Any, ...] | None:
    """Returns the arguments of a call of `target` without keywords; None if it is no such call."""
    return tuple(node.args) if is_call(node, (target,)) and not node.kwargs else None


def are_same(a: Any, b: Any) -> bool:
    """Returns True if two arguments have the same value: one node, or equal calls of such."""
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
