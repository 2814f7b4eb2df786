"""Compiles kernels for GPUs that are not at hand: registers, spills and shared memory they use."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.compiler import ASTSource

from .gpus import Target

MAX_SPILLED = 16
"""Spilled bytes of a thread that are no problem: the first cache holds them, and a program without
loops spills them once."""


@dataclass(frozen=True, slots=True)
class Specialization:
    """A kernel for arguments of given types and constants of given values.

    Attributes:
        signature: the type of each of the kernel's arguments; `"constexpr"` for constants.
        constants: the values of constants.
        aligned: arguments that are multiples of 16, addresses included; Triton specializes on
            these.
        targets: names of the targets to compile it for; by default all.
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
class Usage:
    """The resources that a compiled program uses.

    Attributes:
        registers, spilled: registers and spilled bytes of a thread.
        shared: bytes of shared memory of a program.
        problems: the limits of the target that it exceeds.
    """

    registers: int
    spilled: int
    shared: int
    problems: tuple[str, ...] = ()


def compile_for(target: Target, what: Specialization) -> Usage:
    """Compiles a kernel to machine code of `target`, and returns what that uses."""
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
    if spilled > MAX_SPILLED:
        problems.append(f"{spilled} bytes spilled")
    if shared > target.shared:
        problems.append(f"{shared} bytes of shared memory, at most {target.shared}")
    if registers > target.registers:
        problems.append(f"{registers} registers, at most {target.registers}")
    return Usage(registers, spilled, shared, tuple(problems))


def _read_nvidia(cubin: bytes) -> tuple[int, int]:
    """Returns registers and local bytes: kernels without arrays have local bytes only by spills."""
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
