"""alone: a model whose call, for the time of a trace, is its forward and nothing around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

from torch import nn

from pabc.internals.modules import COMPILED_CALL, call_within_hooks


@contextmanager
def calling_forward_alone(model: nn.Module) -> Iterator[None]:
    """While active, a call of `model` in this thread runs its forward, and nothing around it."""
    state = vars(model)
    before = state.get(COMPILED_CALL)
    state[COMPILED_CALL] = _ForwardAlone(model, before)
    try:
        yield
    finally:
        if before is None:
            del state[COMPILED_CALL]
        else:
            state[COMPILED_CALL] = before


def before_trace(place: Any) -> Any:
    """Returns what is called in the place of a module but for a trace in another thread."""
    return place.before if isinstance(place, _ForwardAlone) else place


class _ForwardAlone:
    """Stands in the place of a model while one thread traces it.

    Attributes:
        before: what is there otherwise, and what other threads call; None: the model's own call.
    """

    # Has no `__dict__`, so that code that walks over a module's attributes ends here.
    __slots__ = ("_model", "_thread", "before")

    def __init__(self, model: nn.Module, before: Callable[..., Any] | None) -> None:
        self._model, self._thread, self.before = model, get_ident(), before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if get_ident() == self._thread:
            return self._model.forward(*args, **kwargs)
        return (self.before or call_within_hooks(self._model))(*args, **kwargs)
