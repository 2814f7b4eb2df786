"""Hashes a sample of values, by which processes find out whether they hold the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def hash_values(tensors: Sequence[torch.Tensor], count: int) -> str:
    """Returns the SHA-256, as 12 hex digits, of at most `count` elements of each tensor.

    The elements are evenly spread. Waits for the tensors' devices, once each.
    """
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(_sample(tensor, count))
    digest = hashlib.sha256()
    for samples in by_device.values():
        digest.update(torch.cat(samples).cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def _sample(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the bytes of the sampled elements, uint8."""
    flat = tensor.detach().flatten()
    step = max(1, -(-flat.numel() // count)) | 1  # odd: not always the same of 2^n channels
    found = flat[::step].clone(memory_format=torch.contiguous_format)  # one element: of stride 1
    if found.is_complex():
        found = torch.view_as_real(found.resolve_conj()).flatten()
    return found.view(torch.uint8)
