"""Permuting copies next to collectives, which `pabc.kernels.permute_copy` computes.

Elsewhere Inductor fuses such copies into the ops that produce or read the elements. A collective
sends and receives memory as it is, so that the copy is a pass over memory of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch.fx import Node

from ..ir import GETITEM, is_call, is_collective, is_tensor, value
from ..relations.groups import COPIES, RELAYOUTS
from .match import Match, first_reason, insert, replace

_SAME_MEMORY = (*RELAYOUTS, GETITEM)


def match_permute_copy(node: Node) -> Match | None:
    """Matches a copy that a collective sends, or one of what it received.

    # before                                            # after
    %p = permute(%x, [2, 0, 1, 3])
    %c = clone(%p, memory_format=contiguous_format)     %c = pabc.permute_copy(%p, [0, 1, 2, 3])
    %s = all_to_all_single(%c, ...)                     %s = all_to_all_single(%c, ...)
    """
    if not _is_copy(node):
        return None
    source = node.args[0]
    assert isinstance(source, Node)
    is_sent = _reaches(node, lambda n: n.users)
    if not is_sent and not _reaches(source, lambda n: n.all_input_nodes):
        return None
    return Match("permute_copy", _shape(source), _why_not(source), lambda: _rewrite(node, source))


def _is_copy(node: Node) -> bool:
    """Returns whether a node copies a tensor that is not contiguous to one that is."""
    if not is_call(node, COPIES) or not is_tensor(node) or not is_tensor(node.args[0]):
        return False
    return not value(node.args[0]).is_contiguous() and value(node).is_contiguous()


def _reaches(node: Node, next_of: Callable[[Node], Iterable[Node]]) -> bool:
    """Returns whether a collective reads, or wrote, the same memory."""
    return any(
        is_collective(each) or (is_call(each, _SAME_MEMORY) and _reaches(each, next_of))
        for each in next_of(node)
    )


def _shape(source: Node) -> tuple[int, ...]:
    """Returns the number of bytes, and of those that are read contiguously."""
    from pabc.kernels.permute_copy import find_tiling

    val = value(source)
    found = find_tiling(val.shape, val.stride())
    run = 1 if found.is_turned else found.sizes[-1]
    return val.numel() * val.element_size(), run * val.element_size()


def _why_not(source: Node) -> str | None:
    from pabc.kernels.permute_copy import BITS, MAX_DIMS, find_tiling

    val = value(source)
    dims = len(find_tiling(val.shape, val.stride()).sizes)
    return first_reason(
        {
            f"{val.dtype}": val.element_size() not in BITS,
            f"{dims} dimensions: at most {MAX_DIMS}": dims > MAX_DIMS,
        }
    )


def _rewrite(node: Node, source: Node) -> None:
    from pabc.kernels.permute_copy import OP

    replace(node, insert(node, OP, source, list(range(value(source).ndim))))
