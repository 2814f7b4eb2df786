"""Layouts after lowering: passes kernels' layouts on to users, and makes channels contiguous."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ..ir import GETITEM, aten, is_call, output_node, value
from ..keys import layout_key
from .match import BEFORE, restride, steps

FREE = ("aten", "prims", "pabc")
"""Namespaces of ops that accept tensors of any strides, or raise an error."""


def keep_layouts(graph: Graph) -> None:
    """Passes the layouts of kernels' results on to their users.

    Users that rely on the former strides, and results of the graph, read a copy that restores them.

    Requires: `meta` of a kernel's result has the former layout under :data:`BEFORE`, if it differs.
    Ensures: no redundant layout copies of these results remain.

        # before: results were by (N, H, T, D)         # after: they are by (N, T, H, D)
        %o = pabc.attention(%q, %k, %v)                %o = pabc.attention(%q, %k, %v)
        %t = transpose(%o, 1, 2)                       %t = transpose(%o, 1, 2)
        %c = clone(%t, contiguous)                     %v = view(%t, [N, T, H * D])
        %v = view(%c, [N, T, H * D])
    """
    before = {n: n.meta.pop(BEFORE) for n in graph.nodes if BEFORE in n.meta}
    origins = list(before)
    now: dict[Node, Any] = {node: node.meta["val"] for node in origins}
    refused: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        changed = [n for n in node.all_input_nodes if n in now]
        result = _compute(node, node.kwargs, now) if changed else None
        if result is None:
            for source in changed:
                refused.setdefault(source, []).append(node)
        elif _keys(result) != _keys(node.meta["val"]):
            now[node], before[node] = result, node.meta["val"]
    if any(_has_gaps(before[source]) for source in refused):
        refused, now = {node: list(node.users) for node in origins}, {}
    for node, val in now.items():
        node.meta["val"] = val
    for source, users in refused.items():
        copied = restride(source.next, source, before[source])
        for user in users:
            user.replace_input_with(source, copied)
    _erase_idle_copies(graph, now)


def _erase_idle_copies(graph: Graph, changed: Collection[Node]) -> None:
    """Erases copies of changed nodes that have the layout of their operand.

    Copies that are results of the graph stay: a result must not alias another tensor.
    """
    result = output_node(graph)
    for node in dict.fromkeys(user for each in changed for user in each.users):
        if not is_call(node, (aten.clone.default,)) or result in node.users:
            continue
        source = node.args[0]
        assert isinstance(source, Node)
        if steps(value(source)) == steps(value(node)):
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def settle_layouts(graph: Graph, flags: Mapping[str, tuple[str, ...]]) -> None:
    """Makes kernels write contiguous results where the channels of their input are far apart.

    Convolutions return such channels, and sums keep their layout through the whole model: each
    kernel would read and write the elements of a row one at a time.

    Args:
        flags: kernel -> its keywords that lay a result out like the first argument.

    Ensures: results of the graph, and operands of ops that rely on strides, are laid out as before.
    Nothing changes if that takes as many copies as there are kernels that gain.
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
        result = _compute(node, kwargs or node.kwargs, now)
        if result is None:
            kept += [(node, source) for source in changed]
        elif _keys(result) != _keys(node.meta["val"]):
            now[node] = result
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
    """Returns the name of the kernel that a node calls; an empty string if it calls none."""
    namespace, _, name = str(getattr(node.target, "name", str)()).partition("::")
    return name if namespace == "pabc" else ""


def _free(node: Node, flags: tuple[str, ...], now: Mapping[Node, Any]) -> dict[str, Any] | None:
    """Returns the keywords of a call with its flags unset.

    None if no flag is set, or if the channels of its input are contiguous.
    """
    is_set = any(node.kwargs.get(flag) for flag in flags)
    if not is_set or now.get(node.args[0], value(node.args[0])).stride(-1) == 1:
        return None
    return {**node.kwargs, **dict.fromkeys(flags, False)}


def _compute(node: Node, kwargs: Mapping[str, Any], now: Mapping[Node, Any]) -> Any:
    """Returns the fake result of a node for the present layouts of its inputs.

    None if the node is not an op of :data:`FREE`, or does not accept these layouts.
    """
    target: Any = node.target
    is_free = target is GETITEM or getattr(target, "namespace", None) in FREE
    if node.op != "call_function" or not is_free:
        return None
    given, named = map_arg((node.args, kwargs), lambda n: now.get(n, n.meta["val"]))
    try:
        return target(*given, **named)
    except (RuntimeError, ValueError):  # there is no such view
        return None


def _has_gaps(val: Tensor) -> bool:
    reach = 1 + sum(
        (size - 1) * stride for size, stride in zip(val.shape, val.stride(), strict=True)
    )
    return reach != val.numel()


def _keys(val: Any) -> list[Any]:
    return [layout_key(each) for each in (val if isinstance(val, (list, tuple)) else [val])]
