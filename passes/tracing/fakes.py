"""fakes: brings the user's fake tensors under one mode.

A model may be made under one :class:`FakeTensorMode`, its arguments under others, and pabc may be
called within yet another; PyTorch does not mix the fake tensors of several modes.
"""

from __future__ import annotations

from typing import Any

import torch

from pabc.internals import pytree
from pabc.internals.fakes import FakeTensor, FakeTensorMode


def share_fake_mode(args: Any) -> Any:
    """Returns `args` with fake tensors of one mode, if they are of several."""
    fakes = [x for x in pytree.tree_leaves(args) if isinstance(x, FakeTensor)]
    if len({id(x.fake_mode) for x in fakes}) < 2:
        return args
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return pytree.tree_map_only(FakeTensor, lambda x: fake_like(x, mode), args)


def fake_like(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """Returns a fake tensor like `tensor`, which may be of another mode."""
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
