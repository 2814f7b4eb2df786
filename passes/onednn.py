"""onednn: computes float32 projections on a CPU with oneDNN, if it is faster than MKL.

PyTorch multiplies float32 matrices with MKL, which reaches half of the peak of some CPUs. PyTorch
also contains oneDNN, which an op of its own calls.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from time import perf_counter
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from pabc.internals.onednn import projection

from .ir import aten, copy_into, is_call, make_module, value

_FEW_ROWS = 16
"""With fewer rows, the overhead of a call of oneDNN exceeds the gain."""
_GAIN = 0.8
"""oneDNN is used if it takes at most this share of MKL's time."""


def use_onednn_pass(gm: GraphModule) -> GraphModule:
    """Replaces projections by oneDNN's, if these are faster, in a graph that is to be compiled.

    Requires: a flat graph with fixed shapes.
    Ensures: the same function, summed in another order; only projections in float32 on a CPU with
    16 rows or more change.

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
        mapping[node].target = projection.default
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
    """Returns True if oneDNN multiplies much faster on this CPU than PyTorch's default.

    Measured once per process, in about 0.1 s. The two alternate, and the minimum of each counts, so
    that other load on the machine does not decide.
    """
    is_on = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    if not is_on or projection is None:
        return False
    x, weight, bias = torch.randn(512, 512), torch.randn(512, 512), torch.randn(512)
    own, theirs = [], []
    for _ in range(16):
        own.append(_time(lambda: projection(x, weight, bias, "none", [], "")))
        theirs.append(_time(lambda: torch.nn.functional.linear(x, weight, bias)))
    return min(own) < _GAIN * min(theirs)


def _time(call: Callable[[], Any]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start
