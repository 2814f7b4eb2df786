"""compiled: what the model compiles itself, which a trace enters as it is written."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch._dynamo import eval_frame

_TORCH = os.path.dirname(os.path.abspath(torch.__file__))
_WRAPPER = "compile_wrapper"
"""What torch.compile puts in a function's place."""


@contextmanager
def noting_compiled(model: nn.Module) -> Iterator[list[str]]:
    """Gives a list that gains a line for each call of something under torch.compile.

    A tracer calls the function beneath: nothing else tells that it was compiled.
    """
    noted: list[str] = []
    own = eval_frame.set_eval_frame

    def note(callback: Any) -> Any:
        frame = sys._getframe(1)
        if frame.f_code.co_name == _WRAPPER:
            noted.append(_describe(model, frame))
        return own(callback)

    eval_frame.set_eval_frame = note
    try:
        yield noted
    finally:
        eval_frame.set_eval_frame = own


def _describe(model: nn.Module, frame: FrameType) -> str:
    """The module that is compiled, or the function and the module that calls it."""
    paths = {id(module): name for name, module in model.named_modules()}
    function = frame.f_locals.get("fn")
    caller: FrameType | None = frame
    while caller is not None and id(caller.f_locals.get("self")) not in paths:
        caller = caller.f_back
    path = "" if caller is None else paths[id(caller.f_locals["self"])]
    where = path or "the model"
    file = getattr(getattr(function, "__code__", None), "co_filename", None)
    if file is None or file.startswith(_TORCH):
        return where
    return f"{function.__qualname__} in {where}"  # type: ignore[union-attr]
