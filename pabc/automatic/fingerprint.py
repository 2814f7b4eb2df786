"""Tells by short texts whether two generations are of one kind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pabc.artifact.sources import code_of_class

_SAMPLED = 64
"""The values of each weight that its digest is of, evenly spaced."""


def describe_family(models: Mapping[str, nn.Module]) -> str:
    """Returns a digest of what models are: their classes, the code of these, and their settings.

    Adapters and other weights leave it as it is.
    """
    digest = hashlib.sha256()
    for name, model in sorted(models.items()):
        kind = type(model)
        config = getattr(model, "config", None)
        settings = dict(config) if isinstance(config, Mapping) else {}
        public = {k: repr(v) for k, v in settings.items() if not k.startswith("_")}
        code = code_of_class(kind)
        for part in (name, kind.__qualname__, code.digest, code.versions):
            digest.update(repr(part).encode())
        digest.update(json.dumps(public, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def describe_weights(models: Mapping[str, nn.Module]) -> str:
    """Returns a digest of the names, shapes and dtypes of all weights, and of values of each."""
    digest = hashlib.sha256()
    for name, model in sorted(models.items()):
        for key, tensor in _tensors(model):
            digest.update(f"{name}.{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(_sample(tensor))
    return digest.hexdigest()[:16]


def versions_of(models: Iterable[nn.Module]) -> int:
    """Returns a number that changes in this process where a weight is replaced or written to."""
    tensors = (x for model in models for _, x in _tensors(model))
    return hash(tuple((id(x), -1 if x.is_inference() else x._version) for x in tensors))


def describe_form(leaves: Sequence[Any]) -> str:
    """Returns the shapes and dtypes of the tensors among the arguments of a call."""
    tensors = (x for x in leaves if isinstance(x, torch.Tensor))
    return ", ".join(f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in tensors)


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _sample(tensor: torch.Tensor) -> bytes:
    """Returns some values of a tensor; none of one that has no values here."""
    if tensor.is_meta or not tensor.numel() or type(tensor) not in (torch.Tensor, nn.Parameter):
        return b""
    flat = tensor.detach().flatten()
    values = flat[:: -(-len(flat) // _SAMPLED)].to("cpu", torch.float64)
    return values.numpy().tobytes()
