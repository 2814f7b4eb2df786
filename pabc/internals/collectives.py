"""collectives: communication between processes, as ops of a graph and by itself. All since 2.6.

- `ALL_TO_ALL`, `ALL_GATHER`, `WAIT` (`torch.ops._c10d_functional`): what a sharded graph calls.
- `NAMESPACES`: of the ops that no CUDA graph can contain.
- `default_store`: where ranks leave their heartbeats.
- `timeout_of`: how long a process group waits.
"""

from __future__ import annotations

from datetime import timedelta

import torch
from torch import distributed as dist

from .release import expecting

with expecting("collective ops"):
    ALL_TO_ALL = torch.ops._c10d_functional.all_to_all_single.default
    ALL_GATHER = torch.ops._c10d_functional.all_gather_into_tensor.default
    WAIT = torch.ops._c10d_functional.wait_tensor.default

NAMESPACES = ("_c10d_functional", "c10d", "c10d_functional")
"""Namespaces of collective ops."""


def default_store() -> dist.Store:
    """Returns the store that all processes share."""
    with expecting("process groups"):
        from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def timeout_of(group: dist.ProcessGroup, device: torch.device) -> timedelta | None:
    """Returns how long collectives of a group wait on a device; None if that cannot be told."""
    backend = group._get_backend(device)
    return getattr(getattr(backend, "options", None), "_timeout", None)
