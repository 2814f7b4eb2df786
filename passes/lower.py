"""lower: replaces parts of a graph by calls of Triton kernels that compute them faster.

Each rule (:mod:`pabc.passes.lowering`) matches a pattern that its kernel may compute, states a
reason if the kernel cannot, and rewrites the match. Nodes are visited from the last to the first,
so that the largest match wins: its inner nodes are not matched again for the same kernel. Gains are
measured, never guessed: `auto` lowers the matches that a table says are faster on this device, and
`force` lowers all that a kernel can compute.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch.fx import Graph, GraphModule, Node

from pabc.kernels.gains import find_gain

from .dead_code import erase_unneeded, remove_dead_code
from .facts import KernelMatch, KernelMatches
from .ir import copy_into, make_module
from .lowering.attention import match_attention
from .lowering.encode_rows import match_encode_rows
from .lowering.joint_norm import match_joint_norm
from .lowering.layouts import keep_layouts, settle_layouts
from .lowering.match import KernelRule, Match
from .lowering.permute_copy import match_permute_copy
from .lowering.residual_norm import KERNEL, match_residual_norm
from .lowering.short_attention import match_short_attention
from .lowering.text_attention import match_text_attention

Kernels = Literal["auto", "off", "force"]
Gains = Callable[[str, torch.device, tuple[int, ...]], bool | None]
"""(kernel, device, shape) -> whether the kernel is faster there than the best alternative; None if
that has not been measured."""

RULES: tuple[KernelRule, ...] = (
    match_short_attention,
    match_text_attention,
    match_attention,
    match_joint_norm,
    match_residual_norm,
    match_encode_rows,
    match_permute_copy,
)
"""All rules, by priority: the first whose match of a node can be lowered wins."""


FREE_LAYOUTS = {KERNEL: ("y_like_x", "n_like_x")}
"""Kernel -> its keyword arguments that give a result the layout of the first argument."""


def lower_pass(
    gm: GraphModule, *, kernels: Kernels, gains: Gains = find_gain
) -> tuple[GraphModule, KernelMatches]:
    """Replaces the parts of a graph that Triton kernels compute by calls of the kernels.

    Requires: a flat graph with fixed shapes.
    Ensures: the same function, within the kernels' tolerances; results have the layouts that they
    had. On a CPU, `auto` changes nothing.

        # before                                           # after
        %o = scaled_dot_product_attention(%q, %k, %v)      %o = pabc.short_attention(%q, %k, %v)
    """
    if kernels == "off":
        return gm, KernelMatches()
    graph = Graph()
    copy_into(graph, gm.graph.nodes, {})
    remove_dead_code(graph)
    lowering = _Lowerer(kernels, gains)
    for node in reversed(list(graph.nodes)):
        lowering.look_at(node)
    keep_layouts(graph)
    settle_layouts(graph, FREE_LAYOUTS)
    return make_module(gm, graph), KernelMatches(tuple(reversed(lowering.looked)))


class _Lowerer:
    """Lowers a graph, node by node from its end.

    Attributes:
        looked: the matches so far, each with its outcome.
    """

    def __init__(self, kernels: Kernels, gains: Gains) -> None:
        self.looked: list[KernelMatch] = []
        self._kernels = kernels
        self._gains = gains
        self._covered: set[tuple[str, Node]] = set()
        """Inner nodes of matches that were not lowered, with the kernel of the match."""
        self._erased: set[Node] = set()

    def look_at(self, node: Node) -> None:
        """Lowers the first match of a node that no reason speaks against."""
        device = None if node in self._erased else _device(node)
        if device is None or (self._kernels == "auto" and device.type == "cpu"):
            return
        refused = []
        for rule in RULES:
            match = rule(node)
            if match is None or (match.kernel, node) in self._covered:
                continue
            reason = _why_not(match, self._kernels, self._gains, device)
            looked = KernelMatch(match.kernel, node.name, match.shape, reason)
            if reason is None:
                match.rewrite()
                self._erased |= erase_unneeded((node, *match.covers))
                self.looked.append(looked)
                return
            refused.append(looked)
            self._covered.update((match.kernel, part) for part in match.covers)
        self.looked += reversed(refused)


def _why_not(match: Match, kernels: Kernels, gains: Gains, device: torch.device) -> str | None:
    if match.reason is not None or kernels == "force":
        return match.reason
    is_faster = gains(match.kernel, device, match.shape)
    if is_faster:
        return None
    return "not measured on this device" if is_faster is None else "not faster here"


def _device(node: Node) -> torch.device | None:
    """Returns the device of the result of a call; None for other nodes."""
    if node.op != "call_function":
        return None
    val: Any = node.meta.get("val")
    first = val[0] if isinstance(val, (tuple, list)) and val else val
    return first.device if isinstance(first, torch.Tensor) else None


def summarize(phases: Mapping[Any, Sequence[KernelMatch]]) -> tuple[str, ...]:
    """Returns a line for each kernel and outcome, for the phase with the most matches."""
    counts: Counter[str] = Counter()
    for each in max(phases.values(), key=len, default=()):
        outcome = "lowered" if each.reason is None else f"not lowered: {each.reason}"
        counts[f"{each.kernel} {outcome}"] += 1
    return tuple(f"{count} x {line}" for line, count in counts.items())
