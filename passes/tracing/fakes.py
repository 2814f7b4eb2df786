"""Fake tensors that users bring: those of several modes do not mix, nor do they with a mode in use.

A model may be made under one :class:`FakeTensorMode`, its arguments under others, and pabc may be
called within yet another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree


def share_fake_mode(args: Any) -> Any:
    """Arguments whose fake tensors, where there are such of several modes, are of one."""
    fakes = [x for x in pytree.tree_leaves(args) if isinstance(x, FakeTensor)]
    if len({id(x.fake_mode) for x in fakes}) < 2:
        return args
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return pytree.tree_map_only(FakeTensor, lambda x: fake_like(x, mode), args)


def fake_like(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """A fake tensor of a mode, whatever mode the given one may be of."""
    if not isinstance(tensor, FakeTensor):
        return mode.from_tensor(tensor)
    with mode:
        return torch.empty_strided(
            tensor.shape,
            tensor.stride(),
            dtype=tensor.dtype,
            device=tensor.device,
            requires_grad=tensor.requires_grad,
        )
