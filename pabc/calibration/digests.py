"""Digests of the weights of models."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

SAMPLED = 1024
"""The values of each weight that its digest is of, at most, evenly spaced."""


def describe_weights(models: Mapping[str, nn.Module]) -> str:
    """Returns a digest of the names, shapes and dtypes of all weights, and of values of each."""
    digest = hashlib.sha256()
    for name, model in sorted(models.items()):
        for key, tensor in find_weights(model):
            digest.update(f"{name}.{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(_sample(tensor))
    return digest.hexdigest()[:16]


def find_weights(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Returns the parameters and buffers of a model, by name."""
    return [*model.named_parameters(), *model.named_buffers()]


def _sample(tensor: torch.Tensor) -> bytes:
    """Returns some values of a tensor; none of one that has no values here."""
    if tensor.is_meta or not tensor.numel() or type(tensor) not in (torch.Tensor, nn.Parameter):
        return b""
    flat = tensor.detach().flatten()
    values = flat[:: -(-len(flat) // SAMPLED)].to("cpu", torch.float64)
    return values.numpy().tobytes()
