"""indexing: rewrites indices of which Python reads tensor data into ops that a graph can hold.

The size of `x[mask]` follows from data; `x[i]` reads a number if `i` is a tensor without
dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from pabc.internals.ops import OpOverload, schema_of

from ..ir import GETITEM, MASKS, aten, is_call

_INDEX = (aten.index.Tensor, aten._unsafe_index.Tensor)
_NONZERO = (torch.nonzero, torch.Tensor.nonzero)


def is_mask(item: Any) -> bool:
    """Returns True for a part of an index that is a mask."""
    return isinstance(item, torch.Tensor) and item.dtype in MASKS


def is_position(item: Any) -> bool:
    """Returns True for a part of an index that is a tensor which Python reads as a number."""
    integers = not isinstance(item, torch.Tensor) or not item.is_floating_point()
    return isinstance(item, torch.Tensor) and item.ndim == 0 and integers and not is_mask(item)


def with_numbers(index: Any, read: Callable[[torch.Tensor], Any]) -> Any:
    """Returns an index with `read` applied to the tensors that indexing would read as numbers."""
    if isinstance(index, tuple):
        return tuple(with_numbers(item, read) for item in index)
    if isinstance(index, slice):
        bounds = (index.start, index.stop, index.step)
        return slice(*(with_numbers(bound, read) for bound in bounds))
    return read(index) if is_position(index) else index


def can_select(source: torch.Tensor, index: Any) -> bool:
    """Returns True if an index has tensors as positions that a graph can look up."""
    items = index if isinstance(index, tuple) else (index,)
    places = [item for item in items if is_position(item)]
    devices = (source.device, torch.device("cpu"))
    return (
        bool(places)
        and all(place.device in devices for place in places)
        and all(_span(item) is not None for item in items)
    )


def select_positions(source: torch.Tensor, index: Any) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """Returns the part of `source` at the tensors among an index, and the rest of the index.

    The part is a copy where Python returns a view: see :func:`check_copies_are_not_written_to`.

    Requires: :func:`can_select`.
    """
    items = list(index) if isinstance(index, tuple) else [index]
    spans = [_span(item) or 0 for item in items]
    for place in reversed([i for i, item in enumerate(items) if is_position(item)]):
        dim = _dimension(items, spans, place, source.ndim)
        source = aten.index.Tensor(source, [*[None] * dim, items[place].long()])
        del items[place], spans[place]
    return source, tuple(items)


def _span(item: Any) -> int | None:
    """Returns the number of dimensions of the source that a part of an index takes, or None."""
    if item is None or item is Ellipsis:
        return 0
    if isinstance(item, torch.Tensor):
        return item.ndim if is_mask(item) else 1
    return 1 if isinstance(item, (int, slice, torch.SymInt)) and type(item) is not bool else None


def _dimension(items: Sequence[Any], spans: Sequence[int], place: int, ndim: int) -> int:
    """Returns the dimension of the source that a part of an index takes."""
    if any(item is Ellipsis for item in items[:place]):
        return ndim - sum(spans[place:])
    return sum(spans[:place])


def mask_positions(index: Any, counts: Sequence[int]) -> Any:
    """Returns an index with positions in place of masks, or None if that is not possible.

    `counts` are the numbers of elements that are set, one per mask.
    """
    items = list(index) if isinstance(index, tuple) else [index]
    rest = list(counts)
    result: list[Any] = []
    for item in items:
        if not is_mask(item):
            result.append(item)
        elif item.ndim == 0 or not rest:
            return None
        else:
            result.extend(torch.nonzero_static(item, size=rest.pop(0)).unbind(1))
    return None if rest else tuple(result)


def call_with_known_sizes(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], shapes: Sequence[Any], value: Any
) -> Any:
    """Calls a function with the recorded size of its result, which follows from data.

    Returns None for functions that are left to :mod:`pabc.passes.tracing.known_sizes`. `shapes` are
    those of the results, `value` is what they follow from.
    """
    if func is torch.Tensor.__getitem__:
        masks = [
            item for item in (args[1] if isinstance(args[1], tuple) else args[1:2]) if is_mask(item)
        ]
        index = mask_positions(args[1], value[len(value) - len(masks) :]) if masks else None
        return None if index is None else args[0][index]
    if func is torch.where:
        return torch.nonzero_static(args[0], size=shapes[0][0]).unbind(1) if args[0].ndim else None
    if func in _NONZERO:
        source, as_tuple = args[0], kwargs.get("as_tuple", False)
        if source.ndim == 0:
            return None
        found = torch.nonzero_static(source, size=shapes[0][0])
        return found.unbind(1) if as_tuple else found
    return None


def check_copies_are_not_written_to(graph: Graph) -> None:
    """Raises `ValueError` for a write to a part that a tensor selects, which is a copy here."""
    copies = {
        node
        for node in graph.nodes
        if is_call(node, _INDEX) and any(map(_is_position_node, node.args[1]))
    }
    for node in graph.nodes:
        for source in _written(node):
            if any(base in copies for base in _bases(source)):
                raise ValueError(f"{node.name} writes to a part picked by a tensor")


def _is_position_node(index: Any) -> bool:
    return isinstance(index, Node) and index.meta["val"].ndim == 0


def _written(node: Node) -> list[Node]:
    op = node.target
    if not isinstance(op, OpOverload):
        return []
    named = zip(schema_of(op).arguments, node.args, strict=False)
    written = [value for arg, value in named if arg.alias_info and arg.alias_info.is_write]
    return [value for value in written if isinstance(value, Node)]


def _bases(node: Node) -> Iterator[Node]:
    """Yields a node and all that it is a view of."""
    while True:
        yield node
        op = node.target
        is_view = isinstance(op, OpOverload) and any(
            result.alias_info is not None for result in schema_of(op).returns
        )
        if not (is_view or op is GETITEM) or not node.all_input_nodes:
            return
        node = node.all_input_nodes[0]
