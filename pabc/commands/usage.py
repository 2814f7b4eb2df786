"""Errors, parsers of values and targets that commands share."""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

EXTRA = ("diffusers", "safetensors", "sklearn", "PIL", "tqdm")
"""The packages that `pip install 'pabc[demo]'` adds, by import name."""


class UsageError(Exception):
    """An error in what the user asked for; the message says what was expected and found."""


def check_extra() -> None:
    """Raises UsageError where a package is missing that the demo needs."""
    for name in EXTRA:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UsageError(f"the demo needs {name}: pip install 'pabc[demo]'") from error


def find_callable(target: str) -> Callable[[], Any]:
    """Returns what `module:callable` names: a callable without arguments.

    Raises UsageError where it is not there, or is something else.
    """
    module, colon, name = target.partition(":")
    if not (module and colon and name):
        raise UsageError(f"target: expected module:callable, found {target!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"target {target!r}: cannot import {module}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise UsageError(f"target {target!r}: {module} has no {name}")
        found = getattr(found, part)
    if not callable(found) or isinstance(found, nn.Module):
        raise UsageError(f"target {target!r}: expected a callable, found {type(found).__name__}")
    try:
        inspect.signature(found).bind()
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"target {target!r}: cannot be called without arguments: {error}"
        ) from error
    return found


def parse_device(text: str) -> str:
    """Returns a device of this machine, as argparse's type."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        message = f"expected a device of this machine, {', '.join(here)}, found {text!r}"
        raise argparse.ArgumentTypeError(message) from error
    return text


def at_least(least: int) -> Callable[[str], int]:
    """Returns argparse's type of integers of `least` or more."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"expected an integer of {least} or more, found {text!r}"
            )
        return int(text)

    return parse
