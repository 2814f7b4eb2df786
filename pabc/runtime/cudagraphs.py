"""Records phases as CUDA graphs, on memory at fixed addresses.

The kernels of a recorded phase are launched together, without Python. They read and write the
addresses that they were recorded with. So each branch of a generation has a :class:`Workspace`: it
holds copies of the inputs and of the hoisted values, and a buffer per slot, which the phases that
compute the slot write and those that reuse it read. When a branch is collected, the next one takes
over its workspace with all recordings.

A phase runs directly the first time, is recorded the second time, and replayed from then on.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule

from pabc import passes
from pabc.passes import CONSTANTS
from pabc.runtime.bindings import InputShapes
from pabc.runtime.chain import ChainPiece
from pabc.runtime.slots import without_spare_memory
from pabc.runtime.stats import Recorder

DEVICE_TYPE = "cuda"
"""The type of the devices on which graphs are recorded."""
MAX_IDLE = 4
"""The most workspaces that a program keeps for later branches."""


WEIGHTS = -1
"""The slot of the weights of forecasts, in a :class:`ReusedPlace`."""


class ReusedPlace(NamedTuple):
    """The memory that takes a reused value: of a slot, by age (0: the newest), the index of a cut.

    Or that of the weights of forecasts (slot `WEIGHTS`), with their number for the age.
    """

    slot: int
    age: int
    cut: int


class Tape:
    """Records what runs on a CUDA device. The recordings of one tape share memory, and must not run
    at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream: torch.cuda.Stream | None = None

    def record(
        self, run: Callable[[], list[torch.Tensor]]
    ) -> tuple[Callable[[], None], list[torch.Tensor]]:
        """Records `run` without running it. Returns what replays it, and the results' tensors."""
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            results = run()
        return graph.replay, results

    def follow(self) -> None:
        """Orders what this thread's stream launches from now on after what was launched before."""
        stream = torch.cuda.current_stream(self._device)
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream


@dataclass(frozen=True, slots=True, eq=False)
class LinkedPiece:
    """A piece of a phase, and its code, which takes a list of inputs and empties it."""

    piece: ChainPiece
    code: Callable[[list[Any]], list[torch.Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class Recordable:
    """A phase in pieces, for the steps that keep certain slots.

    Every value has a place: first come the weights, inputs, hoisted values and reused cuts, then
    the results of each piece in turn.

    Attributes:
        parts: the pieces, in the order in which they run.
        weights: the model's tensors, as they are now.
        outputs: the model's outputs: a constant, or a `Place` among `tensors`.
        tensors: the places of the outputs that are tensors.
        cuts: slot -> the places of its cuts, for the slots that are kept.
        reused: the places of the reused values, in the order of the phase's inputs.
    """

    parts: tuple[LinkedPiece, ...]
    weights: Sequence[torch.Tensor]
    outputs: tuple[Any, ...]
    tensors: tuple[int, ...]
    cuts: Mapping[int, tuple[int, ...]]
    reused: tuple[ReusedPlace, ...]


@dataclass(slots=True)
class _Recording:
    """A recorded piece.

    `copies`: index of an input whose address changes from call to call -> the memory that it is
    copied to.
    """

    replay: Callable[[], None]
    copies: dict[int, torch.Tensor]
    results: list[torch.Tensor]


@dataclass(slots=True)
class _Recorded:
    """The recorded pieces of a phase, valid while the weights have these addresses."""

    addresses: list[int]
    parts: dict[LinkedPiece, _Recording]


class Workspace:
    """Memory at fixed addresses, for one branch at a time, and the phases recorded on it.

    `layout`: the inputs' shapes, where the program has dynamic shapes.
    """

    def __init__(self, device: torch.device, layout: InputShapes, recorder: Recorder) -> None:
        self.layout = layout
        self._tape = Tape(device)
        self._recorder = recorder
        self._inputs: list[Any] = []  # allocated at the first step, as all below
        self._hoisted: tuple[torch.Tensor, ...] = ()
        self._slots: dict[int, tuple[torch.Tensor, ...]] = {}
        self._reused: dict[ReusedPlace, torch.Tensor] = {}
        self._phases: dict[Recordable, _Recorded | None] = {}

    def take_inputs(self, inputs: Sequence[Any]) -> None:
        """Starts a step: copies the inputs of the call to their addresses."""
        self._tape.follow()
        if not self._inputs:
            self._inputs = [_allocate_like(x) if isinstance(x, torch.Tensor) else x for x in inputs]
        for place, given in zip(self._inputs, inputs, strict=True):
            if isinstance(given, torch.Tensor):
                _copy(given, place)

    def take_hoisted(self, values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Copies hoisted values to their addresses, unless they are there; returns them there."""
        if not self._hoisted:
            self._hoisted = tuple(map(_allocate_like, values))
        for place, given in zip(self._hoisted, values, strict=True):
            if given is not place:
                _copy(given, place)
        return self._hoisted

    def run(
        self, phase: Recordable, reused: Sequence[torch.Tensor]
    ) -> tuple[list[Any], list[torch.Tensor]]:
        """Runs a phase on the inputs and hoisted values taken, and on reused values.

        Returns the model's outputs, which the caller owns, and the kept cuts, which stay in this
        workspace and are overwritten when their slots are computed again.
        """
        cuts = [self._take_reused(*pair) for pair in zip(phase.reused, reused, strict=True)]
        values = dict(enumerate([*phase.weights, *self._inputs, *self._hoisted, *cuts]))
        if phase in self._phases:
            self._play(phase, values)
        else:
            for part in phase.parts:
                _set(values, part, part.code(_get(values, part)))
            self._phases[phase] = None
        kept = self._keep(phase, values)
        tensors = [values[place].clone() for place in phase.tensors]
        outputs = [
            tensors[p.index] if isinstance(p, passes.ResultIndex) else p for p in phase.outputs
        ]
        return outputs, kept

    def _take_reused(self, place: ReusedPlace, given: torch.Tensor) -> torch.Tensor:
        """Copies a reused value to its address, unless it is in the buffer of its slot."""
        buffers = self._slots.get(place.slot, ())
        if place.age == 0 and buffers and given is buffers[place.cut]:
            return given
        if place not in self._reused:
            self._reused[place] = _allocate_like(given)
        _copy(given, self._reused[place])
        return self._reused[place]

    def _play(self, phase: Recordable, values: dict[int, Any]) -> None:
        """Runs a phase piece by piece; records those pieces that are not recorded yet."""
        addresses = list(map(torch.Tensor.data_ptr, phase.weights))
        known = self._phases[phase]
        if known is None or known.addresses != addresses:
            known = self._phases[phase] = _Recorded(addresses, {})
        moving: set[int] = set()
        for part in phase.parts:
            given = _get(values, part)
            if part.piece.is_alone:
                moving.update(part.piece.results)
                _set(values, part, part.code(given))
                continue
            if part not in known.parts:
                known.parts[part] = self._record(phase, part, given, moving)
            recording = known.parts[part]
            for i, place in recording.copies.items():
                _copy(given[i], place)
            recording.replay()
            _set(values, part, recording.results)

    def _record(
        self, phase: Recordable, part: LinkedPiece, given: list[Any], moving: set[int]
    ) -> _Recording:
        """Records a piece, and the copies of its cuts to the buffers of their slots."""
        indices = [i for i, place in enumerate(part.piece.inputs) if place in moving]
        copies = {i: _allocate_like(given[i]) for i in indices}
        fixed = [copies.get(i, value) for i, value in enumerate(given)]
        buffers = {
            place: buffer
            for slot, places in phase.cuts.items()
            for place, buffer in zip(places, self._slots[slot], strict=True)
        }

        def run() -> list[torch.Tensor]:
            results = part.code([*fixed])
            for i, place in enumerate(part.piece.results):
                if place in buffers:
                    _copy(results[i], buffers[place])
                    results[i] = buffers[place]
            return results

        try:
            replay, results = self._tape.record(run)
        except Exception as error:
            raise RuntimeError(
                "cudagraphs=True: expected a phase that a CUDA graph can hold, found one that "
                f"PyTorch cannot record ({error}); compile with cudagraphs=False"
            ) from error
        self._recorder.add(recordings=1)
        return _Recording(replay, copies, results)

    def _keep(self, phase: Recordable, values: Mapping[int, Any]) -> list[torch.Tensor]:
        """Copies the kept cuts to the buffers of their slots; returns the buffers."""
        kept: list[torch.Tensor] = []
        for slot, places in phase.cuts.items():
            cuts = [values[place] for place in places]
            if slot not in self._slots:
                self._slots[slot] = tuple(_allocate_like(without_spare_memory(cut)) for cut in cuts)
            for cut, buffer in zip(cuts, self._slots[slot], strict=True):
                if cut is not buffer:
                    _copy(cut, buffer)
            kept += self._slots[slot]
        return kept


class Workspaces:
    """The workspaces of one program: each belongs to a branch while that lives, then is idle."""

    def __init__(self, device: torch.device, recorder: Recorder) -> None:
        self._device = device
        self._recorder = recorder
        self._idle: deque[Workspace] = deque(maxlen=MAX_IDLE)  # the one idle for longest goes
        # Re-entrant: a branch may be collected while this thread holds it.
        self._lock = threading.RLock()
        self._owned: weakref.WeakKeyDictionary[object, Workspace] = weakref.WeakKeyDictionary()

    def of(self, branch: object, layout: InputShapes) -> Workspace:
        """Returns the branch's workspace for inputs of this layout."""
        with self._lock:
            known = self._owned.get(branch)
            if known is not None and known.layout == layout:
                return known
            found = next((w for w in self._idle if w.layout == layout), None)
            if found is None:
                found = Workspace(self._device, layout, self._recorder)
            else:
                self._idle.remove(found)
            self._owned[branch] = found
            weakref.finalize(branch, self._give_back, found).atexit = False
            return found

    def _give_back(self, workspace: Workspace) -> None:
        with self._lock:
            self._idle.append(workspace)


def find_device(guarded: passes.Guarded) -> torch.device:
    """Returns the device of all of a model's inputs and weights.

    Raises: ValueError naming one on another device.
    """
    names = guarded.captured.signature.inputs
    graph = guarded.graph
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"][1:]
    given = {
        f"input {name!r}": node.meta.get("val")
        for name, node in zip(names, placeholders, strict=False)
    }
    given |= {
        str(node.target): node.meta.get("val")
        for module in graph.modules()
        if isinstance(module, GraphModule)
        for node in module.graph.find_nodes(op="get_attr")
        if not str(node.target).startswith(CONSTANTS)
    }
    devices = {name: x.device for name, x in given.items() if isinstance(x, torch.Tensor)}
    for name, device in devices.items():
        if device.type != DEVICE_TYPE:
            raise ValueError(
                f"cudagraphs=True: expected the model and all that it is called with on a "
                f"{DEVICE_TYPE.upper()} device, found {name} on {device}"
            )
    if len(set(devices.values())) != 1:
        found = ", ".join(sorted(map(str, set(devices.values()))))
        raise ValueError(f"cudagraphs=True: expected one device, found {found or 'no tensor'}")
    return next(iter(devices.values()))


def _get(values: Mapping[int, Any], part: LinkedPiece) -> list[Any]:
    return [values[place] for place in part.piece.inputs]


def _set(values: dict[int, Any], part: LinkedPiece, results: Sequence[torch.Tensor]) -> None:
    values.update(zip(part.piece.results, results, strict=True))


def _allocate_like(tensor: torch.Tensor) -> torch.Tensor:
    """Allocates a tensor with the shape, strides, dtype and device of this one."""
    with torch.inference_mode(False):  # else it could not be written to without that mode
        return torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )


def _copy(tensor: torch.Tensor, place: torch.Tensor) -> None:
    """Copies a tensor to one with the same strides; expanded elements once."""
    once = [slice(None) if stride else slice(1) for stride in place.stride()]
    if any(stride == 0 for stride in place.stride()):
        tensor, place = tensor[tuple(once)], place[tuple(once)]
    place.copy_(tensor)
