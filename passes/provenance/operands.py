"""How the axis rules read an op's arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from ..ir import Dims

Rule = Callable[[Node, list[Dims]], Dims]
"""(node, the dimensions of its tensor operands in order) -> the dimensions of its result."""


def lost(node: Node) -> str:
    """Why positions are no longer known after `node`."""
    return f"{node.name} ({node.target}) mixes positions"


def argument(node: Node, index: int, default: Any) -> Any:
    """The positional argument at `index`, where it is given."""
    return node.args[index] if len(node.args) > index else default


def dim_of(node: Node, index: int, default: int, rank: int) -> int:
    """The `dim` argument, positional at `index` or by keyword, counted from the front."""
    dim = argument(node, index, node.kwargs.get("dim", default))
    return int(dim) % rank
