"""bodies: replaces a call of a composite op by the ops that it is made of."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import nullcontext
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from pabc.internals.fakes import detect_fake_mode

from ..ir import GETITEM, output_node
from ..keys import arguments_key, layout_key


def call_key(node: Node) -> Hashable:
    """Returns a key that is equal for calls with equal bodies."""
    sources = node.all_input_nodes
    index = {source: i for i, source in enumerate(sources)}
    layouts = tuple(layout_key(source.meta["val"]) for source in sources)
    return node.target, arguments_key((node.args, node.kwargs), index), layouts


def trace_body(node: Node) -> GraphModule:
    """Returns the ops that a call runs, autocast's casts included, as a graph of its inputs."""
    sources = node.all_input_nodes

    def call(*values: Any) -> Any:
        given = dict(zip(sources, values, strict=True))
        args, kwargs = map_arg((node.args, node.kwargs), given.__getitem__)
        return node.target(*args, **kwargs)

    inputs = [_own(n.meta["val"]) for n in sources]
    with detect_fake_mode((node.meta["val"], inputs)) or nullcontext():  # for what has no inputs
        return make_fx(call)(*inputs)


def _own(val: Any) -> Any:
    """Returns a new fake tensor: nodes may share one, but traces tell inputs by identity."""
    return val.new_empty_strided(val.shape, val.stride()) if isinstance(val, torch.Tensor) else val


def splice_body(node: Node, body: GraphModule) -> None:
    """Replaces a call by its body."""
    graph = node.graph
    facts = {name: fact for name, fact in node.meta.items() if name != "val"}
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    inner: dict[Node, Node] = dict(zip(placeholders, node.all_input_nodes, strict=True))
    ops = [n for n in body.graph.nodes if n.op == "call_function"]
    with graph.inserting_before(node):
        for op in ops:
            inner[op] = graph.node_copy(op, inner.__getitem__)
            inner[op].meta = {**facts, "val": op.meta["val"]}
    results = output_node(body.graph).args[0]
    if isinstance(results, Node):
        node.replace_all_uses_with(inner[results])
    else:
        for user in list(node.users):
            assert user.target is GETITEM, f"{user.name} takes the list that {node.name} returns"
            user.replace_all_uses_with(inner[results[user.args[1]]])
            graph.erase_node(user)
    graph.erase_node(node)
    for op in reversed(ops):
        if not inner[op].users:
            graph.erase_node(inner[op])
