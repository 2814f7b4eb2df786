"""aotinductor: compiles graphs to shared libraries, and loads these.

- `compile_library`: `compile_fx_aot`, and `package_aoti`, which makes its files one. Since 2.6;
  the options since 2.8.
- `load_library`: `AOTIModelPackageLoader`, which needs no Inductor. Since 2.6.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from .release import expecting

OPTIONS = {
    "aot_inductor.package": True,
    # For the wrapper, not the kernels: optimizing it doubles the compile time for no speedup.
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "cpp.dynamic_threads": True,  # the number of threads of the process that runs the code
}


def compile_library(graph: GraphModule, inputs: Sequence[torch.Tensor | None], path: Path) -> None:
    """Compiles a graph for inputs laid out like these, and writes the library to `path`."""
    with expecting("AOTInductor"):
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx_aot
        from torch._inductor.package.package import package_aoti

        known = config.shallow_copy_dict()
        missing = [name for name in OPTIONS if name not in known]
        if missing:
            raise AttributeError(f"no options {missing}")

    given: list[Any] = [*inputs]
    outputs = compile_fx_aot(graph, given, config_patches=OPTIONS)
    assert isinstance(outputs, list)
    with tempfile.TemporaryDirectory() as folder:
        package_aoti(
            str(path), [_without_source(Path(str(file)), Path(folder)) for file in outputs]
        )


def _without_source(file: Path, folder: Path) -> str:
    """Returns a path of this name: an empty file in `folder` for source, which the library does
    not need. To leave it out would not do: PyTorch 2.11 takes other names from its name."""
    if file.suffix != ".cpp":
        return str(file)
    empty = folder / file.name
    empty.touch()
    return str(empty)


def load_library(path: Path, device: torch.device) -> Any:
    """Returns the library at `path`, which may be deleted then; `boxed_run` calls it."""
    with expecting("AOTInductor"):
        loader = torch._C._aoti.AOTIModelPackageLoader
    index = -1 if device.index is None else device.index
    return loader(str(path), "model", False, 1, index)
