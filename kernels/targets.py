"""Kernels compiled for GPUs that are not at hand: registers, spills, shared memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@dataclass(frozen=True, slots=True)
class Specialization:
    """A kernel for arguments of these types and constants of these values.

    `aligned`: arguments that are multiples of 16, addresses included, as Triton takes for granted
    where they are. `targets`: names of those that it is for; none: all.
    """

    label: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    aligned: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of GPU.

    `shared`: bytes of shared memory that a program may have; `registers`: that a thread may have.
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
    """The target that is most like a device, with the shared memory that the device has; sm_90 for
    what is not a GPU, where kernels are interpreted."""
    if device.type != "cuda":
        return TARGETS[1]
    backend = "hip" if torch.version.hip else "cuda"
    alike = next(target for target in TARGETS if target.gpu.backend == backend)
    index = torch.cuda.current_device() if device.index is None else device.index
    found = triton.runtime.driver.active.utils.get_device_properties(index)
    return replace(alike, name=str(device), shared=int(found["max_shared_mem"]))


FEW_BYTES = 16
"""Of a thread, which a program without loops spills once, to the first cache."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a program takes of a GPU: registers and spilled bytes of a thread, shared bytes."""

    registers: int
    spilled: int
    shared: int
    problems: tuple[str, ...] = field(default=())


def compile_for(target: Target, what: Specialization) -> Usage:
    """Compiles a kernel for a target, to machine code."""
    names = list(what.signature)
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in what.aligned}
    source = ASTSource(what.kernel, dict(what.signature), dict(what.constants), attrs)
    options = {"num_warps": what.num_warps, "num_stages": what.num_stages}
    compiled = triton.compile(source, target=target.gpu, options=options)
    if target.gpu.backend == "hip":
        registers, spilled = _read_amd(compiled.asm["amdgcn"])
    else:
        registers, spilled = _read_nvidia(compiled.asm["cubin"])
    shared = int(compiled.metadata.shared)
    problems = []
    if spilled > FEW_BYTES:
        problems.append(f"{spilled} bytes spilled")
    if shared > target.shared:
        problems.append(f"{shared} bytes of shared memory, at most {target.shared}")
    if registers > target.registers:
        problems.append(f"{registers} registers, at most {target.registers}")
    return Usage(registers, spilled, shared, tuple(problems))


def _read_nvidia(cubin: bytes) -> tuple[int, int]:
    """Registers and local bytes, of which a kernel without arrays has none but for spills."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers = [int(n) for n in re.findall(r"REG:(\d+)", text)]
    stack = [int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", text)]
    return max(registers), max(stack)


def _read_amd(assembly: str) -> tuple[int, int]:
    def find(name: str) -> int:
        return max(int(n) for n in re.findall(rf"\.{name}:\s+(\d+)", assembly))

    return find("vgpr_count"), 4 * find("vgpr_spill_count")
