"""alone: a model whose call, for the time of a trace, is its forward and nothing around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import Any

from torch import nn


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
