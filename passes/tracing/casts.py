"""casts: writes out what autocast does within PyTorch's composite ops.

Autocast casts the arguments of the ops on its list. A composite op that is not on it (einsum,
tensordot, a GRU's cell) consists of ops that are. Were it kept whole, or taken apart where autocast
is off, it would compute in another precision.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from pabc.internals import pytree
from pabc.internals.dispatch import (
    COMPOSITE,
    TorchDispatchMode,
    is_any_autocast_enabled,
    parse_key,
    private_device,
)
from pabc.internals.ops import OpOverload, run_composite

from ..ir import GETITEM, output_node
from .bodies import call_key, trace_body

_DEVICES = ("cpu", "cuda", "hpu", "mps", "xpu", private_device())


@contextmanager
def without_autocast() -> Iterator[None]:
    """While active, autocast is off on all devices."""
    with ExitStack() as stack:
        for device in filter(torch.amp.is_autocast_available, _DEVICES):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def write_out_casts_within(gm: GraphModule) -> None:
    """Takes apart, in place, the composite ops whose parts autocast casts.

    Graphs within, such as those of autocast regions, are included.

        # before, autocast on                   # after
        %y = aten.inner(%x, %w)                 %y = wrap_with_autocast(off, [_to_copy, mm], %x, %w)

    Requires: ops as the model calls them, before autocast's casts.
    """
    known: dict[Hashable, GraphModule | None] = {}
    for node in list(gm.graph.nodes):
        _descend(gm, node)
        if not _is_composite(node) or not is_any_autocast_enabled():
            continue
        key = call_key(node)
        if key not in known:
            known[key] = _trace_casts(node) if _has_casts_within(node) else None
        if (body := known[key]) is not None:
            _call_without_autocast(gm, node, body)
    gm.recompile()


def _trace_casts(node: Node) -> GraphModule:
    """Returns the body of a call, as a graph that returns a tuple."""
    body = trace_body(node)
    output = output_node(body.graph)
    if isinstance(output.args[0], Node):
        output.args = ((output.args[0],),)
        body.recompile()
    return body


def _call_without_autocast(gm: GraphModule, node: Node, body: GraphModule) -> None:
    """Replaces a call by its body, whose casts are written out, with autocast off."""
    graph, name = gm.graph, f"taken_apart_{node.name}"
    is_tensor = isinstance(node.meta["val"], torch.Tensor)
    gm.add_submodule(name, body)
    device = max((n.meta["val"].device.type for n in node.all_input_nodes), key="cpu".__ne__)
    with graph.inserting_before(node):
        part = graph.get_attr(name)
        part.meta = {k: v for k, v in node.meta.items() if k != "val"}
        call = graph.call_function(
            torch.ops.higher_order.wrap_with_autocast,
            (device, None, False, False, part, *node.all_input_nodes),
        )
        call.meta = {**node.meta}
        if is_tensor:
            call.meta["val"] = (node.meta["val"],)
            call = graph.call_function(GETITEM, (call, 0))
            call.meta = {**node.meta}
    node.replace_all_uses_with(call)
    graph.erase_node(node)


def _descend(gm: GraphModule, node: Node) -> None:
    """Writes out casts within the graphs that a node takes as arguments."""
    graphs = [n for n in node.all_input_nodes if n.op == "get_attr"]
    with ExitStack() as stack:
        if node.target is torch.ops.higher_order.wrap_with_autocast:
            device, dtype, enabled, cache_enabled = node.args[:4]
            stack.enter_context(torch.autocast(device, dtype, enabled, cache_enabled))
        for source in graphs:
            inner = getattr(gm, str(source.target))
            if isinstance(inner, GraphModule):
                write_out_casts_within(inner)


def _is_composite(node: Node) -> bool:
    op = node.target
    return isinstance(op, OpOverload) and op.has_kernel_for_dispatch_key(COMPOSITE)


def _has_casts_within(node: Node) -> bool:
    """Returns True if the active autocast changes which ops, or dtypes, a call computes with."""
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    devices = {t.device.type for t in tensors}
    if any(_is_listed(node.target, device) for device in devices):
        return False
    run = partial(run_composite(node.target), *args, **kwargs)
    with _Dtypes() as under_autocast:
        run()
    with without_autocast(), _Dtypes() as without:
        run()
    return under_autocast.seen != without.seen


def _is_listed(op: OpOverload, device: str) -> bool:
    """Returns True if autocast casts the arguments of the op itself, and is then off within it."""
    return op.has_kernel_for_dispatch_key(
        parse_key(f"Autocast{device.upper()}") or parse_key("AutocastPrivateUse1")  # type: ignore[arg-type]
    )


class _Dtypes(TorchDispatchMode):
    """Records the ops that run, and the dtypes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen.append((func, [getattr(t, "dtype", None) for t in pytree.tree_leaves(result)]))
        return result
