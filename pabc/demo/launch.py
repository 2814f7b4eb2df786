"""Joins the processes that a demo runs in: a single one, or those that torchrun started."""

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
    """This process: its device, its rank, and the mesh of all processes, if there are several."""

    device: str
    rank: int = 0
    mesh: DeviceMesh | None = None

    @property
    def is_first(self) -> bool:
        """True for the process that prints, writes files, and runs variants of one process."""
        return self.rank == 0

    def wait(self) -> None:
        """Waits until all processes have called this."""
        if self.mesh is not None:
            dist.barrier()


def check_mesh(shape: tuple[int, ...]) -> None:
    """Raises ValueError unless torchrun started as many processes as the mesh has."""
    size, found = math.prod(shape), os.environ.get("WORLD_SIZE")
    if found is None or int(found) != size:
        started = "none" if found is None else found
        raise ValueError(
            f"expected {size} processes, started by `torchrun --nproc-per-node {size} -m pabc demo"
            f" ...`, found {started}"
        )


@contextmanager
def launch(shape: tuple[int, ...] | None, device: str) -> Iterator[Launch]:
    """Joins the processes of a mesh, within the context; on CUDA, each uses a GPU of its own."""
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
