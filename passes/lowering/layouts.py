"""Layouts after lowering: what is far apart in memory without need is written side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ..ir import GETITEM, layout_key, value
from .match import restride

FREE = ("aten", "prims", "pabc")
"""Namespaces of ops that take tensors of any strides, or raise where they do not."""


def settle_layouts(graph: Graph, flags: Mapping[str, tuple[str, ...]]) -> None:
    """Has kernels that may write as they read, or contiguously, do so where channels lie apart.

    A convolution yields such channels, and sums keep them so from one end of a model to the other:
    each kernel would read and write one element of a row at a time.

    Args:
        flags: kernel -> its keywords that say that a result is laid out like the first argument.

    Ensures: results of the graph are laid out as before; so is what comes to an op that would
    refuse to be given other strides. Nothing is done where that takes as many copies as there are
    kernels that gain.
    """
    now: dict[Node, Any] = {}
    freed: dict[Node, dict[str, Any]] = {}
    kept: list[tuple[Node, Node]] = []
    for node in graph.nodes:
        changed = [n for n in node.all_input_nodes if n in now]
        kwargs = _free(node, flags.get(_kernel(node), ()), now)
        if kwargs is not None:
            freed[node] = kwargs
        elif not changed:
            continue
        found = _compute(node, kwargs or node.kwargs, now)
        if found is None:
            kept += [(node, source) for source in changed]
        elif _keys(found) != _keys(node.meta["val"]):
            now[node] = found
    is_exact = not any(_has_gaps(value(source)) for _, source in kept)
    if is_exact and len(kept) < sum(_kernel(node) in flags for node in now):
        _apply(now, freed, kept)


def _apply(
    now: Mapping[Node, Any],
    freed: Mapping[Node, dict[str, Any]],
    kept: Sequence[tuple[Node, Node]],
) -> None:
    before = {node: node.meta["val"] for node in now}
    for node, kwargs in freed.items():
        node.kwargs = kwargs
    for node, val in now.items():
        node.meta["val"] = val
    for node, source in kept:
        node.replace_input_with(source, restride(node, source, before[source]))


def _kernel(node: Node) -> str:
    """The name of the kernel that a node calls, if it calls one."""
    namespace, _, name = str(getattr(node.target, "name", str)()).partition("::")
    return name if namespace == "pabc" else ""


def _free(node: Node, flags: tuple[str, ...], now: Mapping[Node, Any]) -> dict[str, Any] | None:
    """The keywords of a call without the flags, where it has any and its channels lie apart."""
    is_set = any(node.kwargs.get(flag) for flag in flags)
    if not is_set or now.get(node.args[0], value(node.args[0])).stride(-1) == 1:
        return None
    return {**node.kwargs, **dict.fromkeys(flags, False)}


def _compute(node: Node, kwargs: Mapping[str, Any], now: Mapping[Node, Any]) -> Any:
    """What a node yields for what its inputs are now; None: they may not be so."""
    target: Any = node.target
    is_free = target is GETITEM or getattr(target, "namespace", None) in FREE
    if node.op != "call_function" or not is_free:
        return None
    given, named = map_arg((node.args, kwargs), lambda n: now.get(n, n.meta["val"]))
    try:
        return target(*given, **named)
    except (RuntimeError, ValueError):  # a view that there is not
        return None


def _has_gaps(val: Tensor) -> bool:
    reach = 1 + sum(
        (size - 1) * stride for size, stride in zip(val.shape, val.stride(), strict=True)
    )
    return reach != val.numel()


def _keys(val: Any) -> list[Any]:
    return [layout_key(each) for each in (val if isinstance(val, (list, tuple)) else [val])]
