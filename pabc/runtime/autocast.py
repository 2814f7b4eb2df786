"""Autocast around a call: graphs are specialized on it, and run with it switched off.

A captured graph contains its casts, also those of autocast regions within the model. If autocast
stayed on, it would cast once more where the model had switched it off.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch

from pabc.internals.dispatch import is_any_autocast_enabled

Autocast = tuple[tuple[str, torch.dtype], ...]
"""Pairs of a device type for which autocast is enabled, and the dtype."""


def active_autocast(inputs: Sequence[Any]) -> Autocast:
    """Returns the autocast that a call with these inputs runs under."""
    if not is_any_autocast_enabled():
        return ()
    devices = {leaf.device.type for leaf in inputs if isinstance(leaf, torch.Tensor)}
    return tuple(
        (device, torch.get_autocast_dtype(device))
        for device in sorted(devices)
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    )


def without_autocast(inputs: Sequence[Any]) -> AbstractContextManager[object]:
    """Disables autocast within the context, where it is enabled."""
    active = active_autocast(inputs)
    if not active:
        return _AS_IT_IS
    with ExitStack() as stack:
        for device, _ in active:
            stack.enter_context(torch.autocast(device, enabled=False))
        return stack.pop_all()


def with_autocast(autocast: Autocast, inputs: Sequence[Any]) -> AbstractContextManager[object]:
    """Enables autocast within the context as `active_autocast` returned it, and no other."""
    active = active_autocast(inputs)
    if active == autocast:
        return _AS_IT_IS
    with ExitStack() as stack:
        for device in {device for device, _ in active} - {device for device, _ in autocast}:
            stack.enter_context(torch.autocast(device, enabled=False))
        for device, dtype in autocast:
            stack.enter_context(torch.autocast(device, dtype))
        return stack.pop_all()


def without_grad() -> AbstractContextManager[object]:
    """Disables gradients within the context, where they are enabled."""
    return torch.no_grad() if torch.is_grad_enabled() else _AS_IT_IS


_AS_IT_IS = nullcontext()
