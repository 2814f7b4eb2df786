"""composites: which of PyTorch's composite ops a captured graph keeps, and which are decomposed."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import ExitStack
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from pabc.internals.dispatch import (
    COMPOSITE,
    is_any_autocast_enabled,
    is_traceable_wrapper_subclass,
)
from pabc.internals.ops import OpOverload, run_composite, schema_of
from pabc.internals.pytree import tree_leaves

from ..attention_calls import is_attention_op
from ..ir import GETITEM, aten, is_tensor
from ..keys import layout_key
from ..relations.groups import SOFTMAXES
from .bodies import call_key, splice_body, trace_body
from .casts import without_autocast, write_out_casts_within
from .sizes import has_free_sizes

KEPT = frozenset(
    {
        *SOFTMAXES,
        aten._upsample_nearest_exact2d.vec,
        aten.adaptive_avg_pool1d.default,
        aten.adaptive_avg_pool2d.default,
        aten.adaptive_avg_pool3d.default,
        aten.argsort.default,
        aten.avg_pool1d.default,
        aten.batch_norm.default,
        aten.cdist.default,
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv3d.default,
        aten.conv_transpose1d.default,
        aten.conv_transpose2d.input,
        aten.conv_transpose3d.input,
        aten.dropout.default,
        aten.einsum.default,
        aten.group_norm.default,
        aten.inner.default,
        aten.instance_norm.default,
        aten.layer_norm.default,
        aten.linalg_vecdot.default,
        aten.linear.default,
        aten.log_softmax.int,
        aten.matmul.default,
        aten.max_pool2d.default,
        aten.one_hot.default,
        aten.pad.default,
        aten.repeat_interleave.self_int,
        aten.reshape.default,
        aten.rms_norm.default,
        aten.tensordot.default,
        aten.upsample_bicubic2d.vec,
        aten.upsample_bilinear2d.vec,
        aten.upsample_linear1d.vec,
        aten.upsample_nearest1d.vec,
        aten.upsample_nearest2d.vec,
        aten.upsample_nearest3d.vec,
        aten.upsample_trilinear3d.vec,
    }
)
"""Composite ops that a captured graph keeps: a projection, a fused attention, a norm.

Each has an entry in :mod:`pabc.passes.relations.table`, or is removed by canonicalize (dropout); to
take it apart would only hide what it does.
"""


def decompose_unknown_composites(program: ExportedProgram) -> ExportedProgram:
    """Makes every op functional, and decomposes the composite ops that no pass knows.

    A composite is defined by other ops, which eager mode runs: decomposing it changes no bit, and
    spares an entry for every spelling (concat for cat, hstack, tile, ...).
    """
    _drop_dropouts(program.graph)
    if not _needs_whole_trace(program) and _expand(program.graph):
        program.graph_module.recompile()
        return program
    write_out_casts_within(program.graph_module)
    table: dict[OpOverload, Callable[..., Any]] = {}
    fresh = find_unknown_composites(program.graph)
    with ExitStack() as stack:
        while True:
            table.update((op, run_composite(op)) for op in fresh)
            # Not the default table: it would break fused attention into its parts.
            program = program.run_decompositions(dict(table))
            fresh = find_unknown_composites(program.graph) - table.keys()
            if not fresh:
                return program
            # By now casts are written out, and it is forgotten where autocast had been off.
            stack.enter_context(without_autocast())


def _needs_whole_trace(program: ExportedProgram) -> bool:
    """Returns whether the whole graph has to be traced again: for autocast's casts, or for tensors
    that are made of others."""
    tensors = (*program.state_dict.values(), *program.constants.values())
    return is_any_autocast_enabled() or any(map(is_traceable_wrapper_subclass, tensors))


def _drop_dropouts(graph: Graph) -> None:
    """Removes dropout that drops nothing.

    It returns the very tensor that it was given: a write to one is a write to both.
    """
    for node in graph.find_nodes(op="call_function", target=aten.dropout.default):
        if not node.args[2]:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _has_plain_ops(graph: Graph) -> bool:
    """Returns whether no op takes a graph as an argument, sizes are fixed, and no other op reads a
    tensor that is written to."""
    ops = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    return not has_free_sizes(graph) and all(
        node.target is GETITEM or _is_plain(node) for node in ops
    )


def _is_plain(node: Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return False
    arguments = tree_leaves((node.args, node.kwargs))
    return (
        (not _is_write(node) or _functional_form(node) is not None)
        and (isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)) or not node.users)
        and all(map(is_tensor, node.all_input_nodes))
        and not any(isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)) for x in arguments)
    )


def _functional_form(node: Node) -> OpOverload | None:
    """Returns the op that computes what this one writes to its first operand.

    None if another node reads that operand, or a part of it.
    """
    op, operand = node.target, node.args[0]
    assert isinstance(op, OpOverload)
    name, _, overload = op.name().partition("::")[2].partition(".")
    form = getattr(getattr(aten, name.removesuffix("_"), None), overload or "default", None)
    if form is None or not name.endswith("_") or not isinstance(operand, Node):
        return None
    if not _takes_memory(operand.target) or len(operand.users) != 1 or operand in node.args[1:]:
        return None
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return form if layout_key(form(*args, **kwargs)) == layout_key(node.meta["val"]) else None


def _takes_memory(op: Any) -> bool:
    """Returns whether an op's results are new memory: no view, and none of its operands."""
    if not isinstance(op, OpOverload):
        return False
    may_alias = any(result.alias_info is not None for result in schema_of(op).returns)
    return not may_alias and (op in KEPT or not op.has_kernel_for_dispatch_key(COMPOSITE))


def _expand(graph: Graph) -> bool:
    """Replaces each composite by the ops that it consists of; equal calls are traced once.

    Tracing the whole graph, as torch.export does, takes ten times as long. Returns False, with
    nothing changed, if only that makes every op functional.
    """
    if not _has_plain_ops(graph):
        return False
    forms = {node: _functional_form(node) for node in graph.nodes if _is_write(node)}
    keys = {n: call_key(n) for n in graph.nodes if n.op == "call_function" and _is_taken_apart(n)}
    bodies: dict[Hashable, GraphModule] = {}
    for node, key in keys.items():
        if key not in bodies:
            bodies[key] = trace_body(node)
    if any(_is_write(node) for body in bodies.values() for node in body.graph.nodes):
        return False
    for node, form in forms.items():
        node.target = form
    for node, key in keys.items():
        splice_body(node, bodies[key])
    return True


def _is_taken_apart(node: Node) -> bool:
    op = node.target
    if not isinstance(op, OpOverload) or is_attention_op(node):
        return False
    may_alias = any(result.alias_info is not None for result in schema_of(op).returns)
    composite = op.has_kernel_for_dispatch_key(COMPOSITE)
    return composite and (_is_unknown(op) or may_alias)


def _is_write(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and schema_of(node.target).is_mutable


def find_unknown_composites(graph: Graph) -> set[OpOverload]:
    """Returns the composite ops called in a graph that are neither pointwise nor kept."""
    calls = [n for n in graph.nodes if n.op == "call_function" and not is_attention_op(n)]
    targets = {node.target for node in calls}
    return {op for op in targets if isinstance(op, OpOverload) and _is_unknown(op)}


def _is_unknown(op: OpOverload) -> bool:
    return (
        op not in KEPT
        and torch.Tag.pointwise not in op.tags
        and op.has_kernel_for_dispatch_key(COMPOSITE)
    )
