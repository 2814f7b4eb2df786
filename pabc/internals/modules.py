"""modules: what a `torch.nn.Module` holds besides its public attributes. All since 2.6.

- `parameters_of`, `buffers_of`, `children_of`: the dictionaries of what is registered, which
  compiled models compare and follow.
- `forward_hooks`, `GLOBAL_FORWARD_HOOKS` and the like: hooks, which a compiled model runs in the
  place of `torch.nn.Module.__call__`.
- `call_within_hooks` (`_call_impl`): what `__call__` runs by default.
- `COMPILED_CALL`, `compiled_call`: the attribute that it calls instead, by which
  `torch.nn.Module.compile` and `inplace=True` work.
- `MARKED_AS_COMPILED`: an attribute that `torch.compile(module)` sets on the module.
- `APPLY`, `apply`: the method that moves and casts modules.

Names in capitals, but for the global hooks, are those of attributes in `vars(module)`.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as _module

from .release import expecting

PARAMETERS = "_parameters"
BUFFERS = "_buffers"
CHILDREN = "_modules"
FORWARD_HOOKS = "_forward_hooks"
FORWARD_PRE_HOOKS = "_forward_pre_hooks"
COMPILED_CALL = "_compiled_call_impl"
MARKED_AS_COMPILED = "_is_torch_compile"
APPLY = "_apply"
HOOKS = (
    FORWARD_HOOKS,
    FORWARD_PRE_HOOKS,
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)
"""All that a module holds of hooks around its forward."""

Register = Callable[[nn.Module], dict[Any, Any]]
"""Returns a dictionary that a module holds, not a copy."""

with expecting("torch.nn.Module"):
    attrgetter(PARAMETERS, BUFFERS, CHILDREN, COMPILED_CALL, APPLY, "_call_impl", *HOOKS)(
        nn.Module()
    )
    GLOBAL_FORWARD_HOOKS = _module._global_forward_hooks
    GLOBAL_FORWARD_PRE_HOOKS = _module._global_forward_pre_hooks
    GLOBAL_FORWARD_HOOKS_ALWAYS_CALLED = _module._global_forward_hooks_always_called
    GLOBAL_FORWARD_HOOKS_WITH_KWARGS = _module._global_forward_hooks_with_kwargs

parameters_of: Callable[[nn.Module], dict[str, nn.Parameter | None]] = attrgetter(PARAMETERS)
buffers_of: Callable[[nn.Module], dict[str, Tensor | None]] = attrgetter(BUFFERS)
children_of: Callable[[nn.Module], dict[str, nn.Module | None]] = attrgetter(CHILDREN)
forward_hooks: Register = attrgetter(FORWARD_HOOKS)
forward_pre_hooks: Register = attrgetter(FORWARD_PRE_HOOKS)
forward_hooks_with_kwargs: Register = attrgetter("_forward_hooks_with_kwargs")
forward_hooks_always_called: Register = attrgetter("_forward_hooks_always_called")
forward_pre_hooks_with_kwargs: Register = attrgetter("_forward_pre_hooks_with_kwargs")
compiled_call: Callable[[nn.Module], Any] = attrgetter(COMPILED_CALL)
call_within_hooks: Callable[[nn.Module], Callable[..., Any]] = attrgetter("_call_impl")
apply: Callable[[nn.Module], Callable[..., Any]] = attrgetter(APPLY)
