"""composites: which of PyTorch's composite ops a captured graph keeps, and which it takes apart."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph

from ..attention_ops import is_attention_op
from ..ir import SOFTMAXES, aten
from ..provenance.axis_rules import RULES

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_KEPT = frozenset({*RULES, *SOFTMAXES, aten.dropout.default})
"""Composites that the passes know as they are: a projection, a fused attention, a norm."""


def decompose_unknown_composites(program: ExportedProgram) -> ExportedProgram:
    """Makes every op functional, and takes apart the composite ops that no pass has a rule for.

    A composite is defined by other ops, and eager mode runs just those: to take it apart changes
    no bit, and spares a rule for every spelling (concat for cat, hstack, tile, tensordot, ...).
    """
    table: dict[torch._ops.OpOverload, Callable[..., Any]] = {}
    fresh = find_unknown_composites(program.graph)
    while True:
        table.update((op, partial(op._op_dk, _COMPOSITE)) for op in fresh)
        # Not the default table: it would break fused attention into its parts.
        program = program.run_decompositions(dict(table))
        fresh = find_unknown_composites(program.graph) - table.keys()
        if not fresh:
            return program


def find_unknown_composites(graph: Graph) -> set[torch._ops.OpOverload]:
    """Composite ops called in a graph that are neither pointwise nor known to any pass."""
    calls = [n for n in graph.nodes if n.op == "call_function" and not is_attention_op(n)]
    targets = {node.target for node in calls}
    return {op for op in targets if isinstance(op, torch._ops.OpOverload) and _is_unknown(op)}


def _is_unknown(op: torch._ops.OpOverload) -> bool:
    return (
        op not in _KEPT
        and torch.Tag.pointwise not in op.tags
        and op.has_kernel_for_dispatch_key(_COMPOSITE)
    )
