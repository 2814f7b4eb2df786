"""call_sites: finds the code of the model that makes a call."""

from __future__ import annotations

import os
import sys
from types import FrameType

import torch
from torch import nn

from .. import ir

OWN_FOLDERS = tuple(
    os.path.dirname(os.path.abspath(file)) for file in (torch.__file__, ir.__file__)
)
"""The folders of PyTorch and of the passes: code elsewhere is the model's."""


class CallSites:
    """Finds the line, and the module, of the model's code that makes a call."""

    def __init__(self, model: nn.Module) -> None:
        self._paths = {id(module): name for name, module in model.named_modules()}

    def site(self) -> str:
        """Returns file and line, or nothing if no code of the model calls."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith(OWN_FOLDERS):
            frame = frame.f_back
        if frame is None:
            return ""
        return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"

    def path(self) -> str:
        """Returns the qualified name of the module; empty for the model itself."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            path = self._paths.get(id(frame.f_locals.get("self")))
            if path is not None:
                return path
            frame = frame.f_back
        return ""
