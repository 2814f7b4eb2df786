"""The compiled code of a block: for this process, and for others."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BlockFunction = Callable[[list[Any]], Sequence[torch.Tensor]]
"""The list of a block's inputs, which it may clear -> the block's results."""
_KERNEL = re.compile(r"^(\w+) = async_compile\.cpp_pybinding\(", re.MULTILINE)
"""The line that defines a kernel for CPUs in Python code of Inductor: its name."""
_COMPILED = re.compile(r"async_compile\.(?!wait\()|CodeCache\.")
"""Occurs where that code compiles something: once for each kernel for CPUs."""


@dataclass(frozen=True, slots=True)
class Listing:
    """What Inductor compiled a block for CPUs to, in a form that other processes can run.

    Attributes:
        source: a Python module whose `call` runs the block.
        libraries: the extension modules, as bytes, whose functions the source calls: by the names
            under which it calls them.
    """

    source: str
    libraries: Mapping[str, bytes]

    @classmethod
    def of(cls, compiled: Any) -> Listing | None:
        """Returns the listing of a `CompiledFxGraph`; None if it holds more than code for CPUs.

        To be called when all of it is compiled, and then at once: Inductor's files may be gone
        later. None if they are gone already.
        """
        call = compiled.current_callable
        namespace = getattr(call, "__func__", call).__globals__
        kernels = _KERNEL.findall(compiled.source_code)
        if compiled.constants or len(_COMPILED.findall(compiled.source_code)) > len(kernels):
            return None
        paths = {name: Path(namespace[name].__self__.__file__) for name in kernels}
        try:
            libraries = {name: path.read_bytes() for name, path in paths.items()}
        except FileNotFoundError:  # compiled earlier in this process, and deleted since
            return None
        return cls(compiled.source_code, libraries)


@dataclass(frozen=True, slots=True)
class Package:
    """What AOTInductor compiled a block to.

    Attributes:
        data: the content of the package.
        used: the positions of the block's inputs that it takes.
    """

    data: bytes
    used: tuple[int, ...]


@dataclass(slots=True, eq=False)
class CompiledBlock:
    """The compiled code of a block.

    Attributes:
        run: runs it in this process.
        portable: the code in a form for other processes; None: it is not known in any.
    """

    run: BlockFunction
    portable: Listing | Package | None = None
