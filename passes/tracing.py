"""tracing: what torch.export does for its own sake only, switched off while it traces."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx

_NO_TRACES = "do_not_emit_stack_traces"  # not in every release of PyTorch; elsewhere without effect


@contextmanager
def lean_tracing() -> Iterator[None]:
    """Neither notes a stack trace per node nor collects garbage; a third of the time of tracing.

    Traces are for messages that pabc does not print. Nearly all that tracing makes lives as long as
    the graph does: to look for garbage in it again and again finds none.
    """
    traces, collects = getattr(fx.config, _NO_TRACES, False), gc.isenabled()
    setattr(fx.config, _NO_TRACES, True)
    gc.disable()
    try:
        yield
    finally:
        setattr(fx.config, _NO_TRACES, traces)
        if collects:
            gc.enable()
