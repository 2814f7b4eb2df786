"""Copies between a device and host memory that run beside the computation.

Registers the implementations of the two ops of :mod:`pabc.passes.transfers`: `pabc::stash` returns
a copy in pinned host memory, `pabc::fetch` one on the device. On CUDA both copy on a stream of
their own. Every buffer on the device belongs to the stream that computes: wherever it is freed, it
may be reused in that stream's order, so at most one is in flight in either direction, however far
the host runs ahead of the device. (With `record_stream`, buffers would pile up until the device
catches up.) On a CPU both only copy.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True)
class _Transfer:
    """A copy in flight between `kept`, on the host, and `buffer`, which belongs to `stream`."""

    kept: torch.Tensor
    buffer: torch.Tensor
    stream: Any
    done: Any

    def finish(self) -> None:
        """Makes what `stream` does from here on wait for the copy."""
        self.stream.wait_event(self.done)


class _InFlight(threading.local):
    """The transfers of one thread: the one that it reads next, and the one that it began last."""

    arriving: _Transfer | None = None
    leaving: _Transfer | None = None


class Lane:
    """The copies to and from one device.

    All share a stream, so that a fetch follows the stash of the same value, whichever thread did
    it. `cuda` is :mod:`torch.cuda`, or a stand-in for it.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device = device
        self._cuda = cuda
        self._stream = cuda.Stream(device)
        self._in_flight = _InFlight()

    def stash(self, cut: torch.Tensor) -> torch.Tensor:
        """Returns a copy in host memory, for :meth:`fetch` alone: it may not have arrived yet.

        Compiled graphs may overwrite `cut` at once, so a copy of it on the device is sent.
        """
        before, self._in_flight.leaving = self._in_flight.leaving, None
        if before is not None:
            before.finish()
            del before
        kept = torch.empty_like(cut, device="cpu", pin_memory=self._device.type == "cuda")
        self._in_flight.leaving = self._begin(kept, cut.clone(), outward=True)
        return kept

    def fetch(self, kept: torch.Tensor, upcoming: torch.Tensor | None) -> torch.Tensor:
        """Returns a copy on the device, and begins that of `upcoming`, which is fetched next."""
        copy, self._in_flight.arriving = self._in_flight.arriving, None
        if copy is not None:
            copy.finish()
        if copy is None or not self._is_for(copy, kept):
            copy = self._begin(kept, torch.empty_like(kept, device=self._device), outward=False)
            copy.finish()
        if upcoming is not None:
            buffer = torch.empty_like(upcoming, device=self._device)
            self._in_flight.arriving = self._begin(upcoming, buffer, outward=False)
        return copy.buffer

    def _is_for(self, copy: _Transfer, kept: torch.Tensor) -> bool:
        current = self._cuda.current_stream(self._device)
        return copy.kept.data_ptr() == kept.data_ptr() and copy.stream == current

    def _begin(self, kept: torch.Tensor, buffer: torch.Tensor, *, outward: bool) -> _Transfer:
        """Copies once the computation has come this far: until then the buffer may be in use."""
        stream = self._cuda.current_stream(self._device)
        self._stream.wait_event(stream.record_event())
        target, source = (kept, buffer) if outward else (buffer, kept)
        with self._cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            done = self._stream.record_event()
        return _Transfer(kept, buffer, stream, done)


@cache
def lane(device: torch.device) -> Lane:
    """Returns the lane of a CUDA device."""
    return Lane(device)


@torch.library.impl("pabc::stash", "CompositeExplicitAutograd")
def _(cut: torch.Tensor) -> torch.Tensor:
    return lane(cut.device).stash(cut) if cut.is_cuda else cut.to("cpu", copy=True)


@torch.library.impl("pabc::fetch", "CompositeExplicitAutograd")
def _(
    kept: torch.Tensor, device: torch.device, upcoming: torch.Tensor | None = None
) -> torch.Tensor:
    on_cuda = device.type == "cuda"
    return lane(device).fetch(kept, upcoming) if on_cuda else kept.to(device, copy=True)
