"""Compiles a model in place: the module stays the same object, and its calls are pabc's.

If a module has a `_compiled_call_impl`, :meth:`torch.nn.Module.__call__` calls it. Copies and
pickles leave it out. :meth:`torch.nn.Module.compile` uses the same protocol.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from pabc.internals.modules import COMPILED_CALL, call_within_hooks, children_of
from pabc.passes import before_trace
from pabc.runtime.around import call_around
from pabc.wrapper import Wrapper, call_apart


class InPlace:
    """The callable through which a module that was compiled in place is called.

    Several compiled models may be installed in one module, such as those of two pipelines that
    share a transformer. A call goes to the model whose trajectory is entered, else to the last one.
    """

    # Has no `__dict__`, so that code that walks over a module's attributes ends here.
    __slots__ = ("_models", "_module", "replaced")

    def __init__(self, module: nn.Module, replaced: Callable[..., Any] | None = None) -> None:
        """`replaced`: what another compiler has put here; None: nothing."""
        self._module, self.replaced = module, replaced
        # A compiled model that another one is installed in is still called within its trajectories.
        self._models: list[Any] = [module] if isinstance(module, Wrapper) else []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module."""
        if torch.compiler.is_dynamo_compiling():
            return call_apart(self, args, kwargs)
        model = self.current
        if children_of(model)["_orig_mod"] is self._module:
            return model.forward(*args, **kwargs)
        return call_around(self._module, model.forward, args, kwargs, model.reset)

    @property
    def is_empty(self) -> bool:
        """True if no compiled model is installed any more."""
        return all(model is self._module for model in self._models)

    @property
    def current(self) -> Any:
        """The compiled model that a call made here, in this thread or task, belongs to."""
        if len(self._models) > 1:
            for model in reversed(self._models):
                if model.has_entered_trajectory:
                    return model
        return self._models[-1]

    def check_may_compile(self) -> None:
        """Raises ValueError unless all models that are installed here are called as they are."""
        for model in self._models:
            if model is not self._module:
                check_may_compile(model)

    def prefer(self, model: Wrapper) -> None:
        """Makes `model` the last one."""
        if model in self._models:
            # At once: calls of other threads look for their models meanwhile.
            self._models = [*(other for other in self._models if other is not model), model]


class _CacheContext:
    """Stands for a module's `cache_context`, which it calls too; a copy of the module has its
    own, which names nothing here."""

    __slots__ = ("_module", "_place", "replaced")

    def __init__(self, module: nn.Module, place: InPlace, replaced: Any) -> None:
        self._module, self._place, self.replaced = module, place, replaced

    def __call__(self, name: str, **where: Any) -> AbstractContextManager[Any]:
        """Names the calls within; see :meth:`pabc.CompiledModel.cache_context`."""
        model = self._place.current
        return type(model).cache_context(model, name, **where)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return getattr, (self._module, "cache_context")


class _Compile:
    """Stands for a module's `compile`, which would put another call in the place of pabc's."""

    __slots__ = ("_module", "_place")

    def __init__(self, module: nn.Module, place: InPlace) -> None:
        self._module, self._place = module, place

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Compiles what computed steps run; see :meth:`torch.nn.Module.compile`.

        Raises ValueError where a graph runs in the place of the module.
        """
        self._place.check_may_compile()
        self._place.replaced = torch.compile(call_within_hooks(self._module), *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return getattr, (self._module, "compile")


def check_may_compile(model: Any) -> None:
    """Raises ValueError unless a model is called as it is, so that its own call can be compiled."""
    if not model.calls_original:
        raise ValueError(
            "compile: expected a model that pabc calls as it is, found one that it captures: pabc "
            "compiles the phases itself (backend='inductor'), and torch.compile would not meet "
            "them; leave compile() out, or use backend='original', where steps that are computed "
            "run what compile() made"
        )


def check_place(module: nn.Module) -> None:
    """Raises ValueError if another compiler has compiled the module in place."""
    found = vars(module).get(COMPILED_CALL)
    if found is not None and not isinstance(found, InPlace):
        raise ValueError(
            "inplace: expected a model that is not compiled in place, found one that "
            "torch.nn.Module.compile compiled; set model._compiled_call_impl = None first, or use "
            "backend='original', which calls what is there and can skip whole calls"
        )


def install(model: Wrapper, module: nn.Module) -> Callable[[], None]:
    """Makes the calls of `module` those of `model`; returns what takes that back."""
    state = vars(module)
    place = state.get(COMPILED_CALL)
    if not isinstance(place, InPlace):
        place = state[COMPILED_CALL] = InPlace(module, place)
        if hasattr(type(module), "cache_context"):
            replaced = state.get("cache_context")
            state["cache_context"] = _CacheContext(module, place, replaced)
        # A copy of a module that was compiled in place has the method of its class here.
        if "compile" not in state or getattr(state["compile"], "__self__", None) is module:
            state["compile"] = _Compile(module, place)
    place._models.append(model)

    def take_back() -> None:
        if model not in place._models:
            return
        place._models.remove(model)
        if place.is_empty:
            _leave(state, place)

    return take_back


def find_own_call(module: nn.Module) -> Callable[..., Any]:
    """Returns what a call of a module runs, hooks included, were it not compiled in place here."""
    place = vars(module).get(COMPILED_CALL)
    if not isinstance(place, InPlace):
        return module
    return place.replaced or call_within_hooks(module)


def is_installed(model: Wrapper, module: nn.Module) -> bool:
    """Returns True if calls of `module` come to `model`, or to others in its place."""
    place = before_trace(vars(module).get(COMPILED_CALL))
    return isinstance(place, InPlace) and model in place._models


def prefer(model: Wrapper, module: nn.Module) -> None:
    """Makes calls of `module` those of `model`, where several are in its place."""
    place = vars(module).get(COMPILED_CALL)
    if isinstance(place, InPlace):
        place.prefer(model)


def _leave(state: dict[str, Any], place: InPlace) -> None:
    if state.get(COMPILED_CALL) is place:
        del state[COMPILED_CALL]
        if place.replaced is not None:
            state[COMPILED_CALL] = place.replaced
    if isinstance(state.get("compile"), _Compile):
        del state["compile"]
    named = state.get("cache_context")
    if isinstance(named, _CacheContext):
        del state["cache_context"]
        if named.replaced is not None:
            state["cache_context"] = named.replaced
