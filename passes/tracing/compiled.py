"""compiled: notes what the model itself puts under torch.compile; a trace enters it as written."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn

from pabc.internals.dynamo import replacing_in_hop_compile

_TORCH = os.path.dirname(os.path.abspath(torch.__file__))


@contextmanager
def noting_compiled(model: nn.Module) -> Iterator[list[str]]:
    """Yields a list that gains a line for each call of something under torch.compile.

    A tracer calls the function beneath, without a sign that it was compiled.
    """
    noted: list[str] = []
    paths = {id(module): name for name, module in model.named_modules()}

    def noting(is_compiling: Callable[[], bool]) -> Callable[[], bool]:
        def note() -> bool:
            of_pytorch = is_compiling()
            if not of_pytorch:
                found = _describe(paths, sys._getframe(1))
                noted.extend(() if found is None else (found,))
            return of_pytorch

        return note

    with replacing_in_hop_compile(noting):
        yield noted


def _describe(paths: dict[int, str], frame: FrameType) -> str | None:
    """Returns the compiled module's name, or the function's and its caller's.

    Returns None for a function of PyTorch, which itself compiles the branches of a conditional.
    """
    function: Any = frame.f_locals.get("fn")
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    if id(owner) in paths:
        return paths[id(owner)]
    file = getattr(getattr(function, "__code__", None), "co_filename", _TORCH)
    if file.startswith(_TORCH):
        return None
    return f"{getattr(function, '__qualname__', function)} in {_caller(paths, frame)}"


def _caller(paths: dict[int, str], frame: FrameType | None) -> str:
    """Returns the name of the innermost module whose code is on the stack."""
    while frame is not None:
        path = paths.get(id(frame.f_locals.get("self")))
        if path is not None:
            return path or "the model"
        frame = frame.f_back
    return "the model"
