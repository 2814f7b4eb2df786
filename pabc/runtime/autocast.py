"""Autocast around a call: part of what a graph is captured for, and off while the graph runs.

A captured graph has its casts written out, those of autocast regions inside of the model too. Left
on, autocast would cast once more where the model had switched it off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

Autocast = tuple[tuple[str, torch.dtype], ...]
"""Per device type on which it is enabled, the dtype."""


def active_autocast(inputs: Sequence[Any]) -> Autocast:
    """The autocast that a call with these inputs runs under."""
    devices = {leaf.device.type for leaf in inputs if isinstance(leaf, torch.Tensor)}
    return tuple(
        (device, torch.get_autocast_dtype(device))
        for device in sorted(devices)
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    )


@contextmanager
def without_autocast(inputs: Sequence[Any]) -> Iterator[None]:
    """Switches autocast off where it is on."""
    with ExitStack() as stack:
        for device, _ in active_autocast(inputs):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
