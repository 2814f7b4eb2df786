"""foreign: refuses hooks of other libraries that a graph cannot stand for.

A hook that casts weights around a forward is part of that forward, and is captured with it. One
that moves weights while the model runs, or keeps values between calls, is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from pabc.base.forward import hook_around

_OFFLOAD = (
    "keep the weights where they are while the model runs: call model offload "
    "(enable_model_cpu_offload), which moves the whole model between calls, or none"
)
_CACHE = "disable it (disable_cache): pabc's schedule is what reuses here"
_RANKS = "remove it, and shard the model with pabc.compile(..., mesh=mesh)"


def refuse_hooks(model: nn.Module) -> None:
    """Raises ValueError for a hook of diffusers or accelerate that a graph cannot stand for.

    The message names the hook, the module that it is on, and what to do.
    """
    for path, module in model.named_modules():
        where = path or type(model).__name__
        for hook in _hooks(vars(module)):
            problem = _problem(hook, is_around=not path and hook_around(vars(model)) is not None)
            if problem is not None:
                what, advice = problem
                raise ValueError(
                    f"{where}: expected no hook that {what}, found {type(hook).__name__} "
                    f"({type(hook).__module__}); {advice}"
                )


def _hooks(state: dict[str, Any]) -> Iterator[Any]:
    """Yields the hooks that libraries keep in a module's attributes."""
    registered = getattr(state.get("_diffusers_hook"), "hooks", None)
    if isinstance(registered, dict):
        yield from registered.values()
    yield from _parts(state.get("_hf_hook"))


def _parts(hook: Any) -> Iterator[Any]:
    """Yields a hook of accelerate, or the hooks in a sequence of them."""
    if hook is None:
        return
    inner = getattr(hook, "hooks", None)
    if isinstance(inner, tuple | list):
        for each in inner:
            yield from _parts(each)
    else:
        yield hook


def _problem(hook: Any, *, is_around: bool) -> tuple[str, str] | None:
    """Returns what a hook does that a graph cannot, and advice, or None.

    `is_around` is True for the hook that runs around the whole captured forward, at each call.
    """
    home = f"{type(hook).__module__}.{type(hook).__name__}".lower()
    if getattr(hook, "offload", False) or "offload" in home:
        whole = not getattr(hook, "offload", False) and not hasattr(hook, "group")
        return None if is_around and whole else ("offloads weights while the model runs", _OFFLOAD)
    if hasattr(hook, "execution_device") and not is_around:
        return "moves weights or inputs of a part of the model to a device", _OFFLOAD
    if getattr(hook, "_is_stateful", False) or _keeps_state(hook):
        return "keeps values from call to call", _CACHE
    if "parallel" in home:
        return "shards a module", _RANKS
    return None


def _keeps_state(hook: Any) -> bool:
    """Returns True if a hook holds state that is kept per call."""
    return any(hasattr(held, "get_state") for held in vars(hook).values())
