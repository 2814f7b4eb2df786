"""The arguments of a call, as a rule of the table reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import Node


def argument(node: Node, index: int, default: Any, name: str = "") -> Any:
    """Returns the argument at `index`, or by `name`, or the default where it is not given."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def dim_of(node: Node, index: int, default: int, rank: int) -> int:
    """Returns the `dim` argument, positional at `index` or by keyword, counted from the front."""
    return int(argument(node, index, default, "dim")) % rank


def dims_of(node: Node, index: int, rank: int) -> set[int]:
    """Returns the dimensions that the `dim` argument names; all of them where it names none."""
    given: Sequence[int] | int | None = argument(node, index, None, "dim")
    chosen: Iterable[int] = (given,) if isinstance(given, int) else given or range(rank)
    return {int(dim) % rank for dim in chosen} if rank else set()


def nodes_in(arguments: Any) -> list[Node]:
    """Returns the nodes among (nested) arguments, in order; one as often as it is given."""
    found: list[Node] = []
    torch.fx.node.map_arg(arguments, found.append)
    return found
