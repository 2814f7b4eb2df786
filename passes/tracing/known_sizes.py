"""known_sizes: ops whose result's size follows from data, as ops that are told the size.

The size was recorded, and is checked at each call. So the graph can run where sizes must be known
beforehand: a compiler allocates results, and a device is not waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ..ir import aten, is_tensor, value

_MASKS = (torch.bool, torch.uint8)


def tell_sizes(graph: Graph) -> None:
    """Rewrites `nonzero`, `x[mask]`, `masked_select` and `repeat_interleave`, bit for bit.

    Requires: their results have sizes that are numbers.
    """
    for node in list(graph.nodes):
        rewrite = _REWRITES.get(node.target) if node.op == "call_function" else None
        if rewrite is None or not is_tensor(node):
            continue
        with graph.inserting_before(node):
            replacement = rewrite(node)
        if replacement is not None:
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)


def _call(like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A call with the facts of `like`, but for its own fake result."""
    call = like.graph.call_function(target, args, kwargs)
    call.meta.update(like.meta)
    fakes, named = map_arg((args, kwargs), lambda n: n.meta["val"])
    with value(like).fake_mode:  # type: ignore[attr-defined]
        call.meta["val"] = target(*fakes, **named)
    return call


def _nonzero(node: Node) -> Node:
    return _call(node, aten.nonzero_static.default, node.args[0], size=value(node).shape[0])


def _positions(node: Node, mask: Node, count: int) -> list[Node]:
    """Where a mask is set: one vector per dimension of it."""
    found = _call(node, aten.nonzero_static.default, mask, size=count)
    return [_call(node, aten.select.int, found, 1, d) for d in range(value(mask).ndim)]


def _index(node: Node) -> Node | None:
    source, indices = node.args
    given = [d for d, index in enumerate(indices) if index is not None]
    if len(given) != 1 or value(indices[given[0]]).dtype not in _MASKS:
        return None
    (d,) = given
    positions = _positions(node, indices[d], value(node).shape[d])
    return _call(node, aten.index.Tensor, source, [*[None] * d, *positions])


def _masked_select(node: Node) -> Node:
    source, mask = node.args
    shape = list(torch.broadcast_shapes(value(source).shape, value(mask).shape))
    source, mask = (_call(node, aten.expand.default, n, shape) for n in (source, mask))
    positions = _positions(node, mask, value(node).shape[0])
    return _call(node, aten.index.Tensor, source, positions)


def _repeat_interleave(node: Node) -> Node:
    size = value(node).shape[0]
    return _call(node, aten.repeat_interleave.Tensor, node.args[0], output_size=size)


_REWRITES: dict[Any, Callable[[Node], Node | None]] = {
    aten.nonzero.default: _nonzero,
    aten.index.Tensor: _index,
    aten.masked_select.default: _masked_select,
    aten.repeat_interleave.Tensor: _repeat_interleave,
}
