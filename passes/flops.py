"""flops: counts the floating-point operations of a graph."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from pabc.base.flops import count_op_flops
from pabc.base.kinds import COARSE
from pabc.internals import pytree
from pabc.internals.ops import OpOverload

from .attention_calls import attention_call, is_attention_op
from .facts import Guarded
from .nesting.skips import find_skipped
from .tracing.sizes import Sizes, hinted


class FlopCounter:
    """Counts FLOPs of graphs by PyTorch's own formulas, once for each op and shapes.

    `sizes`: the sizes of graphs with dynamic shapes; the FLOPs are then those of the captured call.
    """

    def __init__(self, sizes: Sizes | None = None) -> None:
        self._sizes = sizes
        self._known: dict[tuple[object, str], int] = {}

    def __call__(self, gm: nn.Module) -> int:
        """Returns the FLOPs of one run of a graph module, without those of its submodules."""
        assert isinstance(gm, GraphModule)
        with hinted(gm, self._sizes):
            return sum(map(self._count, gm.graph.nodes))

    def of_regions(self, guarded: Guarded) -> list[int]:
        """Returns the FLOPs of each region: those that a step which reuses it does not run."""
        gm, regions = guarded.graph, guarded.regions
        own = [self(gm.get_submodule(region.name)) for region in regions]
        coarse = [slot for slot, region in enumerate(regions) if region.kind in COARSE]
        skipped = find_skipped(gm.graph, coarse)
        with hinted(gm, self._sizes):
            for slot, nodes in skipped.items():
                own[slot] = sum(own[i] for i in regions[slot].covers if i not in skipped)
                own[slot] += sum(map(self._count, nodes))
        return own

    def _count(self, node: Node) -> int:
        if is_attention_op(node):  # PyTorch has no formula for some
            return attention_call(node).flops
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            return 0
        operands = [n.meta.get("val") for n in node.all_input_nodes]
        if sum(isinstance(val, torch.Tensor) for val in operands) < 2:
            return 0  # only contractions of two tensors count
        call = map_arg((node.args, dict(node.kwargs)), lambda n: n.meta.get("val"))
        key = (node.target, repr(pytree.tree_map(lambda arg: getattr(arg, "shape", arg), call)))
        if key not in self._known:
            self._known[key] = count_op_flops(node.target, *call)
        return self._known[key]
