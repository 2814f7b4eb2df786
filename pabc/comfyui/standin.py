"""Calls a host's model with something else in the place of its diffusion model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


class _Replacement:
    """Is called in the place of a diffusion model; has its attributes."""

    def __init__(self, model: Any, call: Callable[..., Any]) -> None:
        self._model, self._call = model, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def call_around(
    executor: Any,
    model: Any,
    call: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Goes on with a call of the host's model, which calls `call` for its diffusion model.

    The model is shared by all that use it, and is left as it is: a stand-in that has all of its
    attributes but that one runs in its place, within the wrappers of other nodes.
    """
    stand_in = object.__new__(type(model))
    vars(stand_in).update(vars(model))
    vars(stand_in)["diffusion_model"] = _Replacement(model.diffusion_model, call)
    original = getattr(type(model), executor.original.__name__).__get__(stand_in)
    inner = type(executor).new_class_executor(
        original, stand_in, executor.wrappers, executor.idx + 1
    )
    return inner.execute(*args, **kwargs)
