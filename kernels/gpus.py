"""The kinds of GPU that kernels are compiled for, with their limits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from triton.backends.compiler import GPUTarget


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of GPU.

    Attributes:
        gpu: Triton's name of it.
        shared: bytes of shared memory available to one program.
        registers: registers available to one thread.
    """

    name: str
    gpu: GPUTarget
    shared: int
    registers: int


TARGETS = (
    Target("sm_80", GPUTarget("cuda", 80, 32), 163 * 1024, 255),
    Target("sm_90", GPUTarget("cuda", 90, 32), 227 * 1024, 255),
    Target("sm_100", GPUTarget("cuda", 100, 32), 227 * 1024, 255),
    Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 * 1024, 512),
)


def target_of(device: torch.device) -> Target:
    """Returns the target most like `device`, with the shared memory that the device has.

    It is sm_90 for a device that is not a GPU, where kernels are interpreted.
    """
    if device.type != "cuda":
        return TARGETS[1]
    backend = "hip" if torch.version.hip else "cuda"
    alike = next(target for target in TARGETS if target.gpu.backend == backend)
    index = torch.cuda.current_device() if device.index is None else device.index
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return replace(alike, name=str(device), shared=int(properties["max_shared_mem"]))
