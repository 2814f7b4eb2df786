"""keys: hashable keys of the layouts of tensors and of the arguments of nodes."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch.fx import Node


def layout_key(val: Any) -> Hashable:
    """Returns what code may be specialized on of a tensor; None for anything else."""
    if not isinstance(val, torch.Tensor):
        return None
    return tuple(val.shape), val.stride(), val.dtype, val.device


def arguments_key(item: Any, index: dict[Node, int]) -> Hashable:
    """Returns the arguments of a node as a hashable value, with nodes replaced by their `index`.

    The values 0, 0.0, -0.0 and False differ.
    """
    if isinstance(item, Node):
        return Node, index[item]
    if isinstance(item, (tuple, list)):
        return tuple(arguments_key(x, index) for x in item)
    if isinstance(item, dict):
        return tuple((name, arguments_key(x, index)) for name, x in item.items())
    if isinstance(item, slice):
        return slice, arguments_key((item.start, item.stop, item.step), index)
    return type(item), item.hex() if isinstance(item, float) else item
