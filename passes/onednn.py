"""onednn: products in float32 on a CPU by the library that is faster on it.

PyTorch multiplies float32 matrices with MKL, which on some CPUs uses half of what they can do;
oneDNN, which PyTorch has as well, is asked for by an op of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from torch.fx import Graph, GraphModule, Node

from .ir import aten, copy_into, is_call, make_module, value

_FEW_ROWS = 16
"""Below, oneDNN's call costs more than its product gains."""
_GAIN = 0.8
"""Of the other library's time, what oneDNN may take at most to be chosen."""


def use_onednn_pass(gm: GraphModule) -> GraphModule:
    """Has oneDNN compute the projections of a graph that is to be compiled, where it is faster.

    Requires: a flat graph of one size.
    Ensures: the same function, summed in another order; no projection but those in float32 on a
    CPU, of 16 rows or more, is changed.

        # before                                # after
        %h = linear(%n, %w, %b)                 %h = _linear_pointwise(%n, %w, %b, none, [], "")
    """
    if not any(map(_fits, gm.graph.nodes)) or not onednn_is_faster():
        return gm
    graph = Graph()
    mapping: dict[Node, Node] = {}
    copy_into(graph, gm.graph.nodes, mapping)
    for node in filter(_fits, gm.graph.nodes):
        x, weight, bias = (*mapping[node].args, None)[:3]
        mapping[node].target = torch.ops.mkldnn._linear_pointwise.default
        mapping[node].args = (x, weight, bias, "none", [], "")
    return make_module(gm, graph)


def _fits(node: Node) -> bool:
    if not is_call(node, (aten.linear.default,)) or node.kwargs:
        return False
    x, weight = node.args[:2]
    rows = value(x).numel() // max(value(x).shape[-1], 1)
    same = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in map(value, (x, weight)))
    return same and value(weight).ndim == 2 and value(x).ndim >= 2 and rows >= _FEW_ROWS


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies much faster here than what PyTorch takes by itself; measured once
    a process, in about a tenth of a second.

    Both take turns, and the least of each counts, so that other work on the machine does not
    decide.
    """
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    x, weight, bias = torch.randn(512, 512), torch.randn(512, 512), torch.randn(512)
    onednn = torch.ops.mkldnn._linear_pointwise
    own, theirs = [], []
    for _ in range(16):
        own.append(_time(lambda: onednn(x, weight, bias, "none", [], "")))
        theirs.append(_time(lambda: torch.nn.functional.linear(x, weight, bias)))
    return min(own) < _GAIN * min(theirs)


def _time(call: Callable[[], Any]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


@contextmanager
def lowering_onednn() -> Iterator[None]:
    """Lets Inductor compile the op, alone and with a sum that follows it, for weights that are
    inputs: by itself, it does for constants."""
    from torch._inductor.ir import TensorBox
    from torch._inductor.lowering import lowerings
    from torch._inductor.mkldnn_ir import LinearBinary, LinearUnary

    op = torch.ops.mkldnn._linear_pointwise
    kernels: dict[Any, Callable[..., Any]] = {
        op.default: lambda *args: TensorBox.create(LinearUnary.create(*args)),
        op.binary: lambda *args: TensorBox.create(LinearBinary.create(*args)),
    }
    with patch.dict(lowerings, kernels):
        yield
