"""tracing: what torch.export does and says for its own sake only, switched off while it traces."""

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
    """Neither notes a stack trace per node nor collects garbage; a third of the time of tracing.

    Traces are for messages that pabc does not print.
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
    """Nearly all that tracing and lowering make lives as long as the graph does: to look for
    garbage in it again and again finds none."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def quiet_tracing() -> Iterator[None]:
    """Holds back what torch.export tells its own users: errors that it raises carry the reason.

    It warns of its tree specs, of attributes set while tracing, which are restored, and of sizes it
    does not know; where it stops, it prints the graph so far.
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
