"""known_sizes: makes all sizes of a traced graph numbers, even those that follow from data.

Such sizes were recorded, and are checked at each call. Ops that would compute a size are given it,
so that a compiler can allocate results, and the host need not wait for the device.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_arg

from pabc.internals import pytree

from ..ir import MASKS, aten, is_call, is_tensor, value


def with_static_sizes(graph: Graph) -> list[Node]:
    """Replaces sizes that are known by numbers, in fake tensors and arguments.

    Returns the nodes whose sizes, or values, are still unknown.
    """
    unknown = []
    for node in list(graph.nodes):
        val = node.meta.get("val")
        known = val.node.maybe_as_int() if isinstance(val, torch.SymInt) else None
        if known is not None:
            _replace_by_number(node, known)
        elif isinstance(val, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            if free_unbacked_symbols(val) and any(is_tensor(user) for user in node.users):
                unknown.append(node)
        elif val is not None and node.op != "output":
            node.meta["val"] = pytree.tree_map_only(torch.Tensor, _static, val)
            leaves = pytree.tree_leaves(node.meta["val"])
            if any(isinstance(t, torch.Tensor) and free_unbacked_symbols(t.shape) for t in leaves):
                unknown.append(node)
    return [node for node in unknown if not _take_size_from_view(node)]


def _take_size_from_view(node: Node) -> bool:
    """Gives a node the size of the views that alone read it; returns False if there are none.

    PyTorch loses the size of an empty result.
    """
    readers = [user for user in node.users if is_tensor(user)]
    views = [user for user in readers if is_call(user, (aten.view.default,))]
    if not is_tensor(node) or not views or len(views) < len(readers):
        return False
    view = views[0].meta["val"]
    if view.ndim != node.meta["val"].ndim or free_unbacked_symbols(view.shape):
        return False
    node.meta["val"] = view
    return True


def _replace_by_number(node: Node, number: int) -> None:
    for user in list(node.users):
        args, kwargs = map_arg((user.args, user.kwargs), lambda n: number if n is node else n)
        user.args, user.kwargs = args, kwargs


def _static(fake: torch.Tensor) -> torch.Tensor:
    if not any(isinstance(s, torch.SymInt) for s in (*fake.shape, *fake.stride())):
        return fake
    sizes = [size for s in (*fake.shape, *fake.stride()) if (size := _number(s)) is not None]
    if len(sizes) < 2 * fake.ndim:
        return fake
    with fake.fake_mode:  # type: ignore[attr-defined]
        return torch.empty_strided(
            sizes[: fake.ndim], sizes[fake.ndim :], dtype=fake.dtype, device=fake.device
        )


def _number(size: int | torch.SymInt) -> int | None:
    return size.node.maybe_as_int() if isinstance(size, torch.SymInt) else operator.index(size)


def tell_sizes(graph: Graph) -> None:
    """Gives `nonzero`, `x[mask]`, `masked_select` and `repeat_interleave` their results' sizes.

    Requires: those sizes are numbers.
    Ensures: the same bits.
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
    """Returns a new call with the facts of `like`, except its fake result."""
    call = like.graph.call_function(target, args, kwargs)
    call.meta.update(like.meta)
    fakes, named = map_arg((args, kwargs), lambda n: n.meta["val"])
    with value(like).fake_mode:  # type: ignore[attr-defined]
        call.meta["val"] = target(*fakes, **named)
    return call


def _nonzero(node: Node) -> Node:
    return _call(node, aten.nonzero_static.default, node.args[0], size=value(node).shape[0])


def _positions(node: Node, mask: Node, count: int) -> list[Node]:
    """Returns the positions at which a mask is set, one vector per dimension."""
    found = _call(node, aten.nonzero_static.default, mask, size=count)
    return [_call(node, aten.select.int, found, 1, d) for d in range(value(mask).ndim)]


def _index(node: Node) -> Node | None:
    source, indices = node.args
    given = [d for d, index in enumerate(indices) if index is not None]
    if len(given) != 1 or value(indices[given[0]]).dtype not in MASKS:
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
