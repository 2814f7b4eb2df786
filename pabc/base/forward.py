"""forward: the forward of a model that is captured, and what runs around it at each call.

A call of a module runs its hooks around the forward that computes. A library may add more:
accelerate, which moves a whole model to its device, puts another forward in the place of the
module's. All that stays outside of the graph; the forward within is captured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from pabc.internals.modules import COMPILED_CALL, HOOKS

AROUND = frozenset(
    (
        *HOOKS,
        "_hf_hook",
        "_old_forward",
        COMPILED_CALL,
        "cache_context",
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
    if "forward" in state:
        if hook_around(state) is not None:
            within["forward"] = state["_old_forward"]
        if getattr(within["forward"], "__func__", None) is getattr(owner, "forward", None):
            del within["forward"]
    return within
