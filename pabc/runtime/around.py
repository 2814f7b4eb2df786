"""Calls a captured forward within the hooks of its model, as :class:`torch.nn.Module` does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from pabc.base.forward import hook_around
from pabc.internals.modules import (
    FORWARD_HOOKS,
    FORWARD_PRE_HOOKS,
    GLOBAL_FORWARD_HOOKS,
    GLOBAL_FORWARD_HOOKS_ALWAYS_CALLED,
    GLOBAL_FORWARD_HOOKS_WITH_KWARGS,
    GLOBAL_FORWARD_PRE_HOOKS,
    forward_hooks,
    forward_hooks_always_called,
    forward_hooks_with_kwargs,
    forward_pre_hooks,
    forward_pre_hooks_with_kwargs,
)
from pabc.runtime.guards import GuardError

Forward = Callable[..., Any]
"""A function that is called in the place of a model's forward."""


def call_around(
    model: nn.Module, forward: Forward, args: Any, kwargs: Any, abandon: Callable[[], None]
) -> Any:
    """Calls `forward` as a call of `model` calls its forward: within hooks, which get the model.

    `abandon`: ends the generation where a hook raises. Raises ValueError for a hook on all modules,
    which would run in each module of the model: a graph calls none.
    """
    state = vars(model)
    if GLOBAL_FORWARD_HOOKS or GLOBAL_FORWARD_PRE_HOOKS:
        _refuse_hooks_on_all_modules()
    elif not (state[FORWARD_HOOKS] or state[FORWARD_PRE_HOOKS] or "_hf_hook" in state):
        return forward(*args, **kwargs)
    try:
        return _Hooks(model).call(forward, args, kwargs)
    except GuardError:
        raise
    except BaseException:
        abandon()
        raise


class _Hooks:
    """The hooks of one call; those on all modules come first."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._called: set[int] = set()
        self._result: Any = None

    def call(self, forward: Forward, args: Any, kwargs: Any) -> Any:
        """Returns the result that hooks leave; those with `always_call` run after an error, too."""
        try:
            args, kwargs = self._before(args, kwargs)
            self._result = _call_forward(self._model, forward, args, kwargs)
            self._after(args, kwargs)
            return self._result
        except Exception:
            self._call_rest(args, kwargs)
            raise

    def _before(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        model = self._model
        for number, hook in _both(GLOBAL_FORWARD_PRE_HOOKS, forward_pre_hooks(model)):
            if number not in forward_pre_hooks_with_kwargs(model):
                found = hook(model, args)
                if found is not None:
                    args = found if isinstance(found, tuple) else (found,)
                continue
            found = hook(model, args, kwargs)
            if found is None:
                continue
            if not isinstance(found, tuple) or len(found) != 2:
                raise RuntimeError(
                    "forward pre-hook must return None or a tuple of (new_args, new_kwargs), but "
                    f"got {found}."
                )
            args, kwargs = found
        return args, kwargs

    def _after(self, args: Any, kwargs: Any) -> None:
        for number, hook in _both(GLOBAL_FORWARD_HOOKS, forward_hooks(self._model)):
            self._called.add(number)
            self._call_one(number, hook, args, kwargs)

    def _call_rest(self, args: Any, kwargs: Any) -> None:
        model = self._model
        always = {
            **GLOBAL_FORWARD_HOOKS_ALWAYS_CALLED,
            **forward_hooks_always_called(model),
        }
        for number, hook in _both(GLOBAL_FORWARD_HOOKS, forward_hooks(model)):
            if number not in always or number in self._called:
                continue
            try:
                self._call_one(number, hook, args, kwargs)
            except Exception as error:
                warnings.warn(
                    "module forward hook with ``always_call=True`` raised an exception that was "
                    f"silenced as another error was raised in forward: {error}",
                    stacklevel=2,
                )

    def _call_one(self, number: int, hook: Any, args: Any, kwargs: Any) -> None:
        model = self._model
        with_kwargs = (
            number in forward_hooks_with_kwargs(model) or number in GLOBAL_FORWARD_HOOKS_WITH_KWARGS
        )
        given = (args, kwargs) if with_kwargs else (args,)
        found = hook(model, *given, self._result)
        if found is not None:
            self._result = found


def _both(first: Mapping[int, Any], second: Mapping[int, Any]) -> Iterator[tuple[int, Any]]:
    yield from (*first.items(), *second.items())


def _call_forward(model: nn.Module, forward: Forward, args: Any, kwargs: Any) -> Any:
    """Calls `forward` within the hook of accelerate that replaced the model's, if there is one."""
    hook = hook_around(vars(model))
    if hook is None:
        return forward(*args, **kwargs)
    args, kwargs = hook.pre_forward(model, *args, **kwargs)
    with torch.no_grad() if hook.no_grad else nullcontext():
        result = forward(*args, **kwargs)
    return hook.post_forward(model, result)


def _refuse_hooks_on_all_modules() -> None:
    """Raises ValueError for hooks on all modules, except PyTorch's own, which only observe."""
    for hook in (
        *GLOBAL_FORWARD_PRE_HOOKS.values(),
        *GLOBAL_FORWARD_HOOKS.values(),
    ):
        function = getattr(hook, "__func__", getattr(hook, "func", hook))
        name = getattr(function, "__qualname__", type(hook).__qualname__)
        home = str(getattr(function, "__module__", type(hook).__module__))
        if home.partition(".")[0] != "torch":
            raise ValueError(
                f"hooks on all modules: expected none, found {home}.{name}, which would run in "
                "each module of the model, where a graph runs none; remove it for this call, or "
                "register it on the modules that it is for"
            )
