"""Tells hooks that look on, and may keep what they see, from those that take part in a call."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from pabc.passes import hook_path

_WITHIN = ("", ".", ":", "[")
"""Follows the path of a hook in the paths of what it holds."""


def find_hooks(model: nn.Module, holders: Collection[str]) -> set[str]:
    """Returns the paths of the hooks of modules through which these holders are reached."""
    paths = {hook_path(path, hook) for path, _, _, hook in _hooks(model)}
    return {path for path in paths if any(is_within(holder, path) for holder in holders)}


def is_within(holder: str, path: str) -> bool:
    """Returns whether a holder is reached through the hook at a path."""
    return holder.startswith(path) and holder[len(path) :][:1] in _WITHIN


@contextmanager
def noting_onlookers(model: nn.Module, paths: Collection[str]) -> Iterator[set[str]]:
    """Yields the paths, of these, of hooks that look on: they return nothing and write to nothing
    that they are given. It is complete when the context ends."""
    found, replaced = set(paths), []
    for path, register, key, hook in _hooks(model):
        place = hook_path(path, hook)
        if place in found:
            replaced.append((register, key, hook))
            register[key] = _watch(hook, partial(found.discard, place))
    try:
        yield found
    finally:
        for register, key, hook in replaced:
            register[key] = hook


def _hooks(model: nn.Module) -> list[tuple[str, dict[int, Any], int, Any]]:
    return [
        (path, register, key, hook)
        for path, module in model.named_modules()
        for register in (module._forward_pre_hooks, module._forward_hooks)
        for key, hook in register.items()
    ]


def _watch(hook: Callable[..., Any], tell: Callable[[], object]) -> Callable[..., Any]:
    """Returns the hook, which tells if it takes part."""

    def watched(module: nn.Module, *given: Any) -> Any:
        before = _versions(given)
        result = hook(module, *given)
        if result is not None or _versions(given) != before:
            tell()
        return result

    return watched


def _versions(given: Any) -> list[int]:
    leaves = pytree.tree_leaves(given)
    tensors = [x for x in leaves if isinstance(x, torch.Tensor) and not x.is_inference()]
    return [tensor._version for tensor in tensors]
