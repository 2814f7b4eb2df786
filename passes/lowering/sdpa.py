"""Calls of `scaled_dot_product_attention`, with their arguments by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from pabc.kernels.dtypes import FLOATS

from ..ir import aten, is_call, value
from .match import insert

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


@dataclass(frozen=True, slots=True)
class SdpaCall:
    """A call of `scaled_dot_product_attention`: the nodes of its tensors, and its options."""

    node: Node
    query: Node
    key: Node
    value: Node
    mask: Node | None
    dropout: float
    is_causal: bool
    scale: float | None
    has_groups: bool

    @property
    def vals(self) -> tuple[Tensor, Tensor, Tensor]:
        """The fake queries, keys and values."""
        return value(self.query), value(self.key), value(self.value)

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes (N, H, T, S, D) by which gains of attention kernels are looked up."""
        q, k, _ = self.vals
        return (*q.shape[:-1], k.shape[-2], q.shape[-1])

    def insert_mask(self) -> Node | None:
        """Returns the mask with four dimensions, after inserting a view if it has fewer."""
        if self.mask is None or value(self.mask).ndim == 4:
            return self.mask
        sizes = value(self.mask).shape
        return insert(self.node, aten.view.default, self.mask, [1] * (4 - len(sizes)) + [*sizes])

    def reasons(self) -> dict[str, bool]:
        """Returns the reasons why no attention kernel can compute it -> whether each holds."""
        from pabc.kernels.attention_parts import MAX_HEAD_DIM

        q, k, v = self.vals
        mask = None if self.mask is None else value(self.mask)
        return {
            f"{q.ndim} dimensions: 4": q.ndim != 4,
            "dropout": self.dropout != 0,
            "causal": self.is_causal,
            f"head dim {q.shape[-1]}: at most {MAX_HEAD_DIM}": q.shape[-1] > MAX_HEAD_DIM,
            "grouped heads": self.has_groups or q.shape[:-2] != k.shape[:-2],
            "values of another head dim": v.shape != k.shape,
            f"{q.dtype}": q.dtype not in FLOATS,
            "a mask of another dtype": mask is not None and mask.dtype not in (torch.bool, q.dtype),
            "a mask of other dimensions": mask is not None and mask.ndim > 4,
        }


def find_sdpa(node: Node) -> SdpaCall | None:
    """Returns the call that a node is; None if it is another op."""
    if not is_call(node, (aten.scaled_dot_product_attention.default,)):
        return None
    given = {**_DEFAULTS, **dict(zip(_DEFAULTS, node.args, strict=False)), **node.kwargs}
    return SdpaCall(node, *given.values())
