"""dispatch: how PyTorch finds the code of a call (`torch.utils._python_dispatch`, `torch._C`).

- `TorchDispatchMode`: sees each op that a model calls. Since 2.6.
- `is_traceable_wrapper_subclass`: tells tensors that are made of others. Since 2.6.
- `DisableTorchFunction`: what is called within is not traced. Since 2.6.
- `DisableTorchFunctionSubclass`, `EnableTorchFunction`: subclasses act as plain tensors, and again
  as they are written. Since 2.6.
- `disabled_torch_function`: the `__torch_function__` of a class that overrides nothing. Since 2.6.
- `is_any_autocast_enabled`: asked at each call. Since 2.6.
- `COMPOSITE`, `parse_key`, `private_device`: which ops consist of others, and which autocast casts.
  Since 2.6.
- `VARIABLE_FUNCTIONS`: where functions such as `torch.sum` are defined. Since 2.6.
"""

from __future__ import annotations

from typing import Any

import torch

from .release import expecting

with expecting("dispatcher"):
    from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

    DisableTorchFunction = torch._C.DisableTorchFunction
    DisableTorchFunctionSubclass = torch._C.DisableTorchFunctionSubclass
    EnableTorchFunction = torch._C._EnableTorchFunction
    disabled_torch_function = torch._C._disabled_torch_function_impl
    is_any_autocast_enabled = torch._C._is_any_autocast_enabled
    COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
    parse_key = torch._C._parse_dispatch_key
    private_device = torch._C._get_privateuse1_backend_name
    VARIABLE_FUNCTIONS: Any = torch._C._VariableFunctions

__all__ = [
    "COMPOSITE",
    "VARIABLE_FUNCTIONS",
    "DisableTorchFunction",
    "DisableTorchFunctionSubclass",
    "EnableTorchFunction",
    "TorchDispatchMode",
    "disabled_torch_function",
    "is_any_autocast_enabled",
    "is_traceable_wrapper_subclass",
    "parse_key",
    "private_device",
]
