"""aotinductor: compiles graphs to shared libraries, and loads these.

- `compile_library`: `compile_fx_aot`, and `package_aoti`, which makes its files one. Since 2.6;
  the options since 2.8.
- `load_library`: `AOTIModelPackageLoader`, which needs no Inductor. Since 2.6.
"""

from __future__ import annotations

import re
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
        files: list[Any] = [_as_packaged(Path(str(file)), Path(folder)) for file in outputs]
        package_aoti(str(path), files)


def _as_packaged(file: Path, folder: Path) -> str:
    """Returns the path of what a package has for a file that was made, of the same name.

    For source, which the library does not need, an empty one in `folder`: PyTorch 2.11 takes other
    names from its name. For calls of ops on 2.11, one with the dtypes as it reads them.
    """
    changed = folder / file.name
    if file.suffix == ".cpp":
        changed.touch()
        return str(changed)
    if file.suffix == ".json" and torch.__version__ < "2.12":
        text = file.read_text()
        if _DTYPE.search(text):
            changed.write_text(_DTYPE.sub(_renumber, text))
            return str(changed)
    return str(file)


_DTYPE = re.compile(r'(?<="as_scalar_type": )\d+')
_NUMBERS = {"7": "6", "6": "5", "13": "15"}
"""float32, float16 and bfloat16, which ops of pabc.kernels are given: the number that is written
-> the one that PyTorch 2.11 reads as that dtype. Later releases read what is written."""


def _renumber(found: re.Match[str]) -> str:
    if found[0] not in _NUMBERS:
        raise NotImplementedError(f"dtype: expected one of {[*_NUMBERS]}, found {found[0]}")
    return _NUMBERS[found[0]]


def load_library(path: Path, device: torch.device) -> Any:
    """Returns the library at `path`, which may be deleted then; `boxed_run` calls it."""
    with expecting("AOTInductor"):
        loader = torch._C._aoti.AOTIModelPackageLoader
    index = -1 if device.index is None else device.index
    return loader(str(path), "model", False, 1, index)
