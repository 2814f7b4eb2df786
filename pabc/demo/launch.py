"""The processes that a demo runs in: one, or those that torchrun has started."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Launch:
    """Which of the processes this is, on which device, and their mesh, if there is one."""

    device: str
    rank: int = 0
    mesh: DeviceMesh | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process prints, writes, and runs what needs no others."""
        return self.rank == 0

    def wait(self) -> None:
        """Waits for all processes."""
        if self.mesh is not None:
            dist.barrier()


def check_mesh(shape: tuple[int, ...]) -> None:
    """Raises ValueError unless torchrun has started as many processes as the mesh has."""
    size, found = math.prod(shape), os.environ.get("WORLD_SIZE")
    if found is None or int(found) != size:
        started = "none" if found is None else found
        raise ValueError(
            f"expected {size} processes, started by `torchrun --nproc-per-node {size} -m pabc demo"
            f" ...`, found {started}"
        )


@contextmanager
def launch(shape: tuple[int, ...] | None, device: str) -> Iterator[Launch]:
    """The processes, joined; on GPUs, each with its own."""
    if shape is None:
        yield Launch(device)
        return
    check_mesh(shape)
    kind = torch.device(device).type
    options: dict[str, Any] = {"backend": "gloo"}
    if kind == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
        options = {"backend": "nccl", "device_id": torch.device(device)}
    dist.init_process_group(**options)
    try:
        yield Launch(device, dist.get_rank(), init_device_mesh(kind, shape))
    finally:
        dist.destroy_process_group()
