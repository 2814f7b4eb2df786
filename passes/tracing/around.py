"""around: what runs around a captured forward, and the forward within it.

A call of a module runs its hooks, and maybe a library's hook that replaced its forward (accelerate
moves a whole model to its device in this way), around the forward that computes. Those run at each
call, outside of the graph; what is captured is the forward within.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from types import FunctionType, MethodType
from typing import Any

from torch import nn

AROUND = frozenset(
    (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks_with_kwargs",
        "_hf_hook",
        "_old_forward",
        "_compiled_call_impl",
        "cache_context",
    )
)
"""Attributes of a model that stand for what runs around its forward."""


def hook_around(state: Mapping[str, Any]) -> Any:
    """The hook of accelerate, among a model's attributes, whose `pre_forward` and `post_forward`
    run around the forward, or None. One that another forward was put around is no such hook."""
    hook = state.get("_hf_hook")
    if hook is None:
        return None
    is_outermost = getattr(state.get("forward"), "__wrapped__", None) is state.get("_old_forward")
    return hook if is_outermost else None


def inner_forward(model: nn.Module) -> Callable[..., Any]:
    """The forward that is captured."""
    return model.forward if hook_around(vars(model)) is None else vars(model)["_old_forward"]


def sees_spelling(forward: Callable[..., Any]) -> bool:
    """Whether a forward can tell `f(x, 2)` from `f(x, t=2)`: it is decorated, or no function.

    The parameters of a plain function are what they are, however they were given.
    """
    function = forward.__func__ if isinstance(forward, MethodType) else forward
    plain = isinstance(function, FunctionType)
    return not plain or hasattr(function, "__wrapped__") or hasattr(function, "__signature__")


def state_within(state: Mapping[str, Any], owner: type | None) -> dict[str, Any]:
    """Those of a captured model's attributes that its forward can meet. `owner`: its class."""
    within = {name: value for name, value in state.items() if name not in AROUND}
    if "forward" in state:
        if hook_around(state) is not None:
            within["forward"] = state["_old_forward"]
        if getattr(within["forward"], "__func__", None) is getattr(owner, "forward", None):
            del within["forward"]
    return within


@contextmanager
def calling_forward_alone(model: nn.Module) -> Iterator[None]:
    """While active, a call of `model` in this thread runs its forward, and nothing around it."""
    state = vars(model)
    before = state.get("_compiled_call_impl")
    state["_compiled_call_impl"] = partial(
        _call_forward_alone, model, get_ident(), before or model._call_impl
    )
    try:
        yield
    finally:
        if before is None:
            del state["_compiled_call_impl"]
        else:
            state["_compiled_call_impl"] = before


def _call_forward_alone(
    model: nn.Module, thread: int, otherwise: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    if get_ident() == thread:
        return model.forward(*args, **kwargs)
    return otherwise(*args, **kwargs)
