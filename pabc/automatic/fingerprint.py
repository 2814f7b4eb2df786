"""Tells by short texts whether two generations are of one kind."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import nn

from pabc.calibration.digests import find_weights
from pabc.internals.tensors import version_of


def describe_family(models: Mapping[str, nn.Module]) -> str:
    """Returns a digest of what models are: their classes, with their methods, and their settings.

    Adapters and other weights leave it as it is.
    """
    digest = hashlib.sha256()
    for name, model in sorted(models.items()):
        kind = type(model)
        public = _describe_settings(model)
        for part in (name, kind.__module__, kind.__qualname__, *_methods(kind)):
            digest.update(repr(part).encode())
        digest.update(json.dumps(public, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _describe_settings(model: nn.Module) -> dict[str, str]:
    """Returns the settings of a model that has a `config`; of another, the shapes of its weights,
    which adapters would change."""
    config = getattr(model, "config", None)
    if isinstance(config, Mapping):
        return {k: repr(v) for k, v in config.items() if not k.startswith("_")}
    return {name: f"{tuple(tensor.shape)}" for name, tensor in find_weights(model)}


def _methods(kind: type) -> Iterator[tuple[str, bytes, tuple[str, ...]]]:
    """Yields the name, the code, and the names in it, of each method of a module's class."""
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, method in sorted(vars(base).items()):
            function = inspect.unwrap(method) if callable(method) else method
            if isinstance(function, FunctionType):
                yield name, function.__code__.co_code, function.__code__.co_names


def versions_of(models: Iterable[nn.Module]) -> int:
    """Returns a number that changes in this process where a weight is replaced or written to."""
    tensors = (x for model in models for _, x in find_weights(model))
    return hash(tuple((id(x), -1 if x.is_inference() else version_of(x)) for x in tensors))


def describe_form(leaves: Sequence[Any]) -> str:
    """Returns the shapes and dtypes of the tensors among the arguments of a call."""
    tensors = (x for x in leaves if isinstance(x, torch.Tensor))
    return ", ".join(f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in tensors)
