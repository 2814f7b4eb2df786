"""alone: a model whose call, for the time of a trace, is its forward and nothing around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import Any

from torch import nn

from pabc.internals.modules import COMPILED_CALL, call_within_hooks


@contextmanager
def calling_forward_alone(model: nn.Module) -> Iterator[None]:
    """While active, a call of `model` in this thread runs its forward, and nothing around it."""
    state = vars(model)
    before = state.get(COMPILED_CALL)
    state[COMPILED_CALL] = partial(
        _call_forward_alone, model, get_ident(), before or call_within_hooks(model)
    )
    try:
        yield
    finally:
        if before is None:
            del state[COMPILED_CALL]
        else:
            state[COMPILED_CALL] = before


def _call_forward_alone(
    model: nn.Module, thread: int, otherwise: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    if get_ident() == thread:
        return model.forward(*args, **kwargs)
    return otherwise(*args, **kwargs)
