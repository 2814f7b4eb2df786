"""Digests of the weights of models, and of the precision of calls."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pabc.runtime.autocast import active_autocast

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


def describe_precision(leaves: Sequence[Any]) -> str:
    """Returns the floating-point dtypes among the arguments of a call that is under way, and the
    autocast that it runs under."""
    tensors = (x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point())
    dtypes = " and ".join(sorted({_spell(x.dtype) for x in tensors}))
    casts = (f"autocast to {_spell(dtype)} on {name}" for name, dtype in active_autocast(leaves))
    return ", ".join((dtypes, *casts))


def _spell(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sample(tensor: torch.Tensor) -> bytes:
    """Returns some values of a tensor; none of one that has no values here."""
    if tensor.is_meta or not tensor.numel() or type(tensor) not in (torch.Tensor, nn.Parameter):
        return b""
    flat = tensor.detach().flatten()
    values = flat[:: -(-len(flat) // SAMPLED)].to("cpu", torch.float64)
    return values.numpy().tobytes()
