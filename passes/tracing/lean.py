"""lean: switches off what torch.export does and prints beside tracing."""

from __future__ import annotations

import gc
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO

from torch import fx

_NO_TRACES = "do_not_emit_stack_traces"  # not in every release of PyTorch; elsewhere without effect


@contextmanager
def lean_tracing() -> Iterator[None]:
    """While active, no stack trace is kept per node and no garbage is collected.

    That saves a third of the time of tracing; pabc does not print those stack traces.
    """
    traces = getattr(fx.config, _NO_TRACES, False)
    setattr(fx.config, _NO_TRACES, True)
    try:
        with without_garbage_collection():
            yield
    finally:
        setattr(fx.config, _NO_TRACES, traces)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """While active, no garbage is collected: nearly all that tracing and lowering allocate lives as
    long as the graph."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def quiet_tracing() -> Iterator[None]:
    """While active, torch.export's warnings and prints are held back.

    It warns of tree specs, of attributes set while tracing, which pabc restores, and of unknown
    sizes; where it stops, it prints the graph so far, but its errors carry the reason too.
    """
    sizes = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = sizes.level
    sizes.setLevel(logging.ERROR)
    printed = StringIO()
    try:
        with warnings.catch_warnings(), redirect_stderr(printed):
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*was assigned during export")
            yield
        sys.stderr.write(printed.getvalue())
    finally:
        sizes.setLevel(level)
