"""fold: specializes a graph with dynamic shapes on the sizes of one call."""

from __future__ import annotations

from torch.fx import GraphModule

from .facts import InputSizes
from .tracing.sizes import fold_sizes, is_size


def fold_sizes_pass(gm: GraphModule, sizes: InputSizes) -> GraphModule:
    """Replaces symbols, and nodes that compute sizes, by numbers.

    Requires: a flat graph (:func:`lift_weights_pass`).
    Ensures: no node computes a size, although inputs may be sizes; the same function for inputs of
    these sizes. A graph with fixed shapes is returned unchanged.

        # before                                # after
        %s = sym_size(%x, 1)                    %y = view(%x, [2, 1024, 64])
        %y = view(%x, [2, %s, 64])
    """
    return fold_sizes(gm, sizes.values)


def verify_sizes(gm: GraphModule) -> None:
    """Checks that no node computes a size."""
    for node in gm.graph.nodes:
        assert node.op == "placeholder" or not is_size(node), f"{node.name} is a size"
