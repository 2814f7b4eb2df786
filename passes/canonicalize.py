"""canonicalize: removes ops that change no bit: asserts, no-op casts and copies, duplicates."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import GraphModule, Node

from .dead_code import remove_dead_code
from .ir import aten, is_call, is_random, is_tensor, value
from .tracing.sizes import is_size, same_sizes

_ASSERTS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_async.msg,
        aten._assert_async.default,
        aten._assert_scalar.default,
        aten.sym_constrain_range_for_size.default,
    }
)


def _same_layout(node: Node, source: Node) -> bool:
    a, b = value(node), value(source)
    return a.dtype == b.dtype and a.device == b.device and same_sizes(a.stride(), b.stride())


def _is_noop_copy(node: Node) -> bool:
    return is_call(node, (aten.clone.default, aten._to_copy.default)) and _same_layout(
        node, node.args[0]
    )


def _is_noop_alias(node: Node) -> bool:
    return is_call(node, (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default))


def _is_eval_dropout(node: Node) -> bool:
    return is_call(node, (aten.dropout.default,)) and not node.args[2]


def _is_times_one(node: Node) -> bool:
    targets = (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)
    if not is_call(node, targets) or isinstance(node.args[1], Node):
        return False
    return node.args[1] == 1 and is_tensor(node.args[0]) and _same_layout(node, node.args[0])


def _is_same_view(node: Node) -> bool:
    targets = (aten.view.default, aten.reshape.default, aten.expand.default)
    return is_call(node, targets) and (
        same_sizes(value(node).shape, value(node.args[0]).shape)
        and _same_layout(node, node.args[0])
    )


_NOOPS: tuple[Callable[[Node], bool], ...] = (
    _is_noop_alias,
    _is_noop_copy,
    _is_eval_dropout,
    _is_times_one,
    _is_same_view,
)


def _is_returned_copy(node: Node) -> bool:
    """Returns True if the model returns `node`; a copy stays, as its source may be an input."""
    return any(user.op == "output" for user in node.users)


def _key(node: Node) -> tuple[object, ...] | None:
    """Returns a key that is equal for nodes with equal values; None: the node is never merged."""
    if node.op == "get_attr":
        return ("get_attr", node.target)
    if node.op != "call_function" or not (is_tensor(node) or is_size(node)):
        return None
    if is_random(node):
        return None
    return (node.target, repr(node.args), repr(sorted(node.kwargs.items())))


def canonicalize_pass(gm: GraphModule) -> GraphModule:
    """Removes nodes that do nothing at run time and merges nodes that compute the same.

    Requires: a functional ATen graph (:func:`capture`).
    Ensures: outputs bitwise as before; no assert, no copy to the same dtype, device and strides,
    no eval-mode dropout, no multiplication by one, no two nodes with equal target and arguments.

        # before                                # after
        %c = aten.clone(%y)                     %z = aten.mul(%g, %y)
        %d = aten.div(%c, 1.0)
        %z = aten.mul(%g, %d)
    """
    seen: dict[tuple[object, ...], Node] = {}
    for node in list(gm.graph.nodes):
        if is_call(node, _ASSERTS):
            gm.graph.erase_node(node)
        elif any(is_noop(node) for is_noop in _NOOPS) and not _is_returned_copy(node):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
        elif (key := _key(node)) is not None:
            first = seen.setdefault(key, node)
            if first is not node:
                node.replace_all_uses_with(first)
                gm.graph.erase_node(node)
    remove_dead_code(gm.graph)
    return gm
