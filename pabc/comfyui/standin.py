"""Calls a host's model with something else in the place of its diffusion model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from pabc.internals.modules import CHILDREN, children_of


class _Replacement(nn.Module):
    """Is called in the place of a diffusion model; has its attributes."""

    def __init__(self, model: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        vars(self).update(_replaced=model, _call=call)  # not as a module within this one

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_replaced"], name)


def call_around(
    executor: Any,
    model: nn.Module,
    call: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Goes on with a call of the host's model, which calls `call` for its diffusion model.

    The model is shared by all that use it, and is left as it is: a stand-in that has all of its
    attributes but that one runs in its place, within the wrappers of other nodes.
    """
    own: Any = model.diffusion_model
    stand_in = object.__new__(type(model))
    vars(stand_in).update(vars(model))
    modules = {**children_of(model), "diffusion_model": _Replacement(own, call)}
    vars(stand_in)[CHILDREN] = modules  # its own: other wrappers may set a module, as the host's
    original = getattr(type(model), executor.original.__name__).__get__(stand_in)
    inner = type(executor).new_class_executor(
        original, stand_in, executor.wrappers, executor.idx + 1
    )
    return inner.execute(*args, **kwargs)
