"""lower: parts of a graph that a Triton kernel computes faster become calls of it.

Each rule finds what its kernel may compute, says why not where it may not, and rewrites it. Whether
it is worth it is not guessed: `auto` lowers what a measured table says gains on the device at hand,
`force` lowers all that a kernel computes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import Graph, GraphModule, Node

from .ir import aten, copy_into, derived, is_call, value

Kernels = Literal["auto", "off", "force"]
Gains = Callable[[str, torch.device, tuple[int, ...]], bool | None]
"""(kernel, device, shape) -> whether it is faster there than what a user would otherwise get; None:
not measured."""


@dataclass(frozen=True, slots=True)
class Lowering:
    """What became of a part that a kernel might compute.

    `reason`: why it was left alone; None: it was lowered.
    """

    kernel: str
    node: str
    shape: tuple[int, ...]
    reason: str | None


def lower_pass(gm: GraphModule, *, kernels: Kernels, gains: Gains) -> GraphModule:
    """Replaces attention over short sequences by calls of `pabc::short_attention`.

    Requires: a flat graph of one size.
    Ensures: the same function, within the kernel's tolerance; `meta["lowered"]` says what was
    looked at. On a CPU, `auto` looks at nothing.

        # before                                           # after
        %o = scaled_dot_product_attention(%q, %k, %v)      %o = pabc.short_attention(%q, %k, %v)
    """
    if kernels == "off":
        return gm
    found = [node for node in gm.graph.nodes if is_call(node, (_SDPA,))]
    if kernels == "auto":
        found = [node for node in found if value(node).device.type != "cpu"]
    decided = {node: _decide(node, kernels, gains) for node in found}
    graph = Graph()
    mapping: dict[Node, Node] = {}
    copy_into(graph, gm.graph.nodes, mapping)
    for node, lowering in decided.items():
        if lowering.reason is None:
            _rewrite(mapping[node])
    result = derived(gm, graph)
    result.meta["lowered"] = tuple(decided.values())
    return result


_SDPA = aten.scaled_dot_product_attention.default
_DEFAULTS: dict[str, Any] = {
    "query": None,
    "key": None,
    "value": None,
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}


def _arguments(node: Node) -> dict[str, Any]:
    return {**_DEFAULTS, **dict(zip(_DEFAULTS, node.args, strict=False)), **node.kwargs}


def _decide(node: Node, kernels: Kernels, gains: Gains) -> Lowering:
    given = _arguments(node)
    q, k = value(given["query"]), value(given["key"])
    shape = (*q.shape[:-1], k.shape[-2], q.shape[-1])
    reason = _why_not(node, given)
    if reason is None and kernels == "auto":
        is_faster = gains("short_attention", q.device, shape)
        if not is_faster:
            reason = "not measured on this device" if is_faster is None else "not faster here"
    return Lowering("short_attention", node.name, shape, reason)


def _why_not(node: Node, given: dict[str, Any]) -> str | None:
    """Why the kernel cannot compute this attention."""
    from pabc.kernels.short_attention import MAX_HEAD_DIM, MAX_LENGTH

    q, k, v = (value(given[name]) for name in ("query", "key", "value"))
    mask = None if given["attn_mask"] is None else value(given["attn_mask"])
    lengths = (q.shape[-2], k.shape[-2])
    reasons = {
        f"{max(lengths)} tokens: at most {MAX_LENGTH}": max(lengths) > MAX_LENGTH,
        f"head dim {q.shape[-1]}: at most {MAX_HEAD_DIM}": q.shape[-1] > MAX_HEAD_DIM,
        f"{q.ndim} dimensions: 4": q.ndim != 4,
        "dropout": given["dropout_p"] != 0,
        "causal": given["is_causal"],
        "grouped heads": given["enable_gqa"] or q.shape[:-2] != k.shape[:-2],
        "values of another head dim": v.shape != k.shape,
        f"{q.dtype}": q.dtype not in (torch.float32, torch.bfloat16, torch.float16),
        "a mask of another dtype": mask is not None and mask.dtype not in (torch.bool, q.dtype),
        "a layout of the result that is read as it is": not _result_fits(node),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _result_fits(node: Node) -> bool:
    """Whether the result lies as the kernel's does, by N, T, H, D, or without gaps."""
    out = value(node)
    return out.ndim == 4 and (out.transpose(1, 2).is_contiguous() or out.is_contiguous())


def _rewrite(node: Node) -> None:
    from pabc.kernels.short_attention import OP

    given, out = _arguments(node), value(node)
    mask = given["attn_mask"]
    with node.graph.inserting_before(node):
        if mask is not None and value(mask).ndim < 4:
            mask = _call(
                node, aten.view.default, mask, [1] * (4 - value(mask).ndim) + [*value(mask).shape]
            )
    tensors = [given["query"], given["key"], given["value"], mask]
    node.target, node.kwargs = OP, {}
    node.args = (*tensors, None, None, None, None, given["scale"])
    if not out.transpose(1, 2).is_contiguous():
        with node.graph.inserting_after(node):
            copy = node.graph.call_function(
                aten.clone.default, (node,), {"memory_format": torch.contiguous_format}
            )
        copy.meta = dict(node.meta)
        node.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy)
    N, H, T, D = out.shape
    node.meta["val"] = out.new_empty((N, T, H, D)).transpose(1, 2)


def _call(like: Node, target: Any, *args: Any) -> Node:
    made = like.graph.call_function(target, args)
    made.meta = {key: like.meta[key] for key in ("slot",) if key in like.meta}
    made.meta["val"] = target(value(args[0]), *args[1:])
    return made


def summarize(phases: Mapping[Any, Sequence[Lowering]]) -> tuple[str, ...]:
    """A line for each kernel and outcome, of the phase in which most was looked at."""
    counts: Counter[str] = Counter()
    for each in max(phases.values(), key=len, default=()):
        outcome = "lowered" if each.reason is None else f"not lowered: {each.reason}"
        counts[f"{each.kernel} {outcome}"] += 1
    return tuple(f"{count} x {line}" for line, count in counts.items())
