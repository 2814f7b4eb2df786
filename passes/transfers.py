"""transfers: copies between a device and host memory that run beside the computation.

Two ops stand for them in graphs: `pabc::stash` gives a copy in pinned host memory, `pabc::fetch`
one on the device. On CUDA both copy on a stream of their own. Every buffer on the device belongs to
the stream that computes: wherever it is freed, it may be used again in that stream's order, so at
most one is on its way in either direction, however far the host runs ahead of the device. (With
`record_stream`, buffers would pile up until the device catches up.) On a CPU they copy, no more.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True)
class _Copy:
    """A copy that was begun between `kept`, on the host, and `buffer`, which is `stream`'s."""

    kept: torch.Tensor
    buffer: torch.Tensor
    stream: Any
    done: Any

    def finish(self) -> None:
        """What `stream` does from here on happens after the copy."""
        self.stream.wait_event(self.done)


class _InFlight(threading.local):
    """What a thread has begun: the copy that it is to read next, and the one it stored last."""

    arriving: _Copy | None = None
    leaving: _Copy | None = None


class Lane:
    """The copies to and from one device.

    They share a stream, so that what is fetched was stashed before, whichever thread did it.
    `cuda` is :mod:`torch.cuda`, or what stands in for it.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device = device
        self._cuda = cuda
        self._stream = cuda.Stream(device)
        self._in_flight = _InFlight()

    def stash(self, cut: torch.Tensor) -> torch.Tensor:
        """A copy in host memory, for :meth:`fetch`: the host itself would read it too early.

        `cut` may be overwritten at once, as compiled graphs do without asking: a copy of it leaves.
        """
        before, self._in_flight.leaving = self._in_flight.leaving, None
        if before is not None:
            before.finish()
            del before
        kept = torch.empty_like(cut, device="cpu", pin_memory=self._device.type == "cuda")
        self._in_flight.leaving = self._begin(kept, cut.clone(), outward=True)
        return kept

    def fetch(self, kept: torch.Tensor, upcoming: torch.Tensor | None) -> torch.Tensor:
        """A copy on the device; begins the one of `upcoming`, which is to be fetched next."""
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

    def _is_for(self, copy: _Copy, kept: torch.Tensor) -> bool:
        current = self._cuda.current_stream(self._device)
        return copy.kept.data_ptr() == kept.data_ptr() and copy.stream == current

    def _begin(self, kept: torch.Tensor, buffer: torch.Tensor, *, outward: bool) -> _Copy:
        """Copies once the computation has come to here: until then the buffer may be in use."""
        stream = self._cuda.current_stream(self._device)
        self._stream.wait_event(stream.record_event())
        target, source = (kept, buffer) if outward else (buffer, kept)
        with self._cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            done = self._stream.record_event()
        return _Copy(kept, buffer, stream, done)


@cache
def lane(device: torch.device) -> Lane:
    """The one lane of a CUDA device."""
    return Lane(device)


@torch.library.custom_op("pabc::stash", mutates_args=(), schema="(Tensor cut) -> Tensor")
def stash(cut: torch.Tensor) -> torch.Tensor:
    """A copy of a cut in host memory."""
    return lane(cut.device).stash(cut) if cut.is_cuda else cut.to("cpu", copy=True)


@stash.register_fake
def _(cut: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(cut, device="cpu")


@torch.library.custom_op(
    "pabc::fetch",
    mutates_args=(),
    schema="(Tensor kept, Device device, Tensor? upcoming=None) -> Tensor",
)
def fetch(
    kept: torch.Tensor, device: torch.device, upcoming: torch.Tensor | None = None
) -> torch.Tensor:
    """A copy on the device of what was stashed; `upcoming` is what is fetched after it."""
    on_cuda = device.type == "cuda"
    return lane(device).fetch(kept, upcoming) if on_cuda else kept.to(device, copy=True)


@fetch.register_fake
def _(
    kept: torch.Tensor, device: torch.device, upcoming: torch.Tensor | None = None
) -> torch.Tensor:
    return torch.empty_like(kept, device=device)
