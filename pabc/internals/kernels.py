"""kernels: what compiled code of Inductor needs of PyTorch where Inductor itself is not imported.

- `is_function_of_torch` (`extern_kernels`): which of its kernels are functions of `torch`. Since
  2.6.
- `give_tensor_address`: a variable of the environment, from which kernels on the CPU learn the
  address of a function that reads their arguments. Since 2.6.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from .release import expecting

EXTERN = "extern_kernels"
"""The variable in code of Inductor whose attributes are kernels that it has not compiled."""


def is_function_of_torch(name: str) -> bool:
    """Returns True if Inductor's kernel of this name is the function of `torch` of that name.

    Others are functions of Inductor's own, for which the code has to import it.
    """
    found = sys.modules.get("torch._inductor.select_algorithm")
    kernel = getattr(getattr(found, EXTERN, torch), name, None)
    return kernel is not None and kernel is getattr(torch, name, None)


def give_tensor_address() -> None:
    """Makes extension modules of Inductor loadable: they call a function at this address."""
    with expecting("Inductor"):
        guards: Any = torch._C._dynamo.guards
        address = str(guards._torchinductor_pyobject_tensor_data_ptr)
    os.environ["_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"] = address
