"""memory: tensors that keep no more memory alive than their own."""

from __future__ import annotations

import torch


def without_spare_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Returns `tensor`, or a copy of it if it is a part of a larger buffer that it keeps alive.

    The copy of a tensor without gaps has the same strides.
    """
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
