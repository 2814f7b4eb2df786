"""forward: the forward of a model that is captured, and what runs around it at each call.

A call of a module runs its hooks around the forward that computes. A library may add more:
accelerate, which moves a whole model to its device, puts another forward in the place of the
module's. All that stays outside of the graph; the forward within is captured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from pabc.internals.modules import COMPILED_CALL, HOOKS, MARKED_AS_COMPILED

AROUND = frozenset(
    (
        *HOOKS,
        "_hf_hook",
        "_old_forward",
        COMPILED_CALL,
        MARKED_AS_COMPILED,
        "cache_context",
        "compile",
    )
)
"""Attributes of a model that belong to what runs around its forward."""


def hook_around(state: Mapping[str, Any]) -> Any:
    """Returns accelerate's hook from a model's attributes if its `pre_forward` and `post_forward`
    run around the forward, else None: so too where another forward was put around it."""
    hook = state.get("_hf_hook")
    if hook is None:
        return None
    is_outermost = getattr(state.get("forward"), "__wrapped__", None) is state.get("_old_forward")
    return hook if is_outermost else None


def inner_forward(model: nn.Module) -> Callable[..., Any]:
    """Returns the forward that is captured."""
    return model.forward if hook_around(vars(model)) is None else vars(model)["_old_forward"]


def state_within(state: Mapping[str, Any], owner: type | None) -> dict[str, Any]:
    """Returns those attributes of a captured model, of class `owner`, that its forward can meet."""
    within = {name: value for name, value in state.items() if name not in AROUND}
    if "forward" in state and hook_around(state) is not None:
        within["forward"] = state["_old_forward"]
    if _is_own_forward(within.get("forward"), state, owner):
        del within["forward"]
    return within


def state_of_part(state: Mapping[str, Any], owner: type | None) -> Mapping[str, Any]:
    """Returns the attributes of a module within a model, of class `owner`. Leaves out a `forward`
    that is the class's own, which hooks put there when they are removed."""
    if not _is_own_forward(state.get("forward"), state, owner):
        return state
    return {name: value for name, value in state.items() if name != "forward"}


def _is_own_forward(forward: Any, state: Mapping[str, Any], owner: type | None) -> bool:
    """Returns True for the method of the class, bound to the module that has these attributes."""
    if getattr(forward, "__func__", None) is not getattr(owner, "forward", None):
        return False
    return forward is not None and getattr(forward.__self__, "__dict__", None) is state
