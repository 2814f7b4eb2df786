"""Hears the calls of one generation, and finds in them what a :class:`Recording` is made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from pabc.base.structure import Structure, flatten
from pabc.calibration.recording import Recorder, Recording, Vector
from pabc.internals.tensors import version_of
from pabc.runtime.autocast import Autocast, active_autocast

_SMALL = 4096
"""The most elements of a tensor that is copied, in case the caller's loop fills it anew."""
_MOST_PARTS = 4
"""The most copies of the latents that one call is given as a batch: guidance makes 2 or 3."""


class Stream(NamedTuple):
    """Latents, and the output that updates them, such as those of a video, or of its sound.

    Attributes:
        leaf: the index of the latents among the flattened arguments.
        output: the index of the output among the floating-point tensors of the result.
        is_trailing: whether the latents are the last channels of the argument, which has more than
            the output; else they are the first.
    """

    leaf: int
    output: int
    is_trailing: bool = False


@dataclass(frozen=True, eq=False)
class KeptCall:
    """A call, as far as it is needed to record it and to make it again with other latents.

    Attributes:
        model: which model was called, where a generation has several.
        leaves: the flattened arguments; latents, and small tensors, are copies.
        structure: the containers around them, `(args, kwargs)`.
        outputs: copies of the floating-point tensors of the result.
        versions: of the tensors among the leaves, to tell whether they were written to since.
        autocast: that it ran under.
    """

    model: int
    leaves: list[Any]
    structure: Structure
    outputs: Vector
    versions: tuple[int, ...]
    autocast: Autocast = ()

    @property
    def is_intact(self) -> bool:
        """True if no tensor among the arguments was written to since."""
        return self.versions == _versions(self.leaves)


@dataclass(frozen=True, eq=False)
class HeardGeneration:
    """One generation that was heard to its end.

    Attributes:
        recording: the inner products.
        calls: step -> name -> the call.
        streams: the latents.
        parts: how many copies of the latents the batch of the first call of each step consists of;
            others may have fewer, such as a further term of guidance.
        result: the final latents, if known.
    """

    recording: Recording
    calls: tuple[dict[str, KeptCall], ...]
    streams: tuple[Stream, ...]
    parts: int
    result: Vector | None

    @property
    def batch(self) -> int:
        """The samples of the latents."""
        first = next(iter(self.calls[0].values()))
        return first.leaves[self.streams[0].leaf].shape[0] // self.parts

    def parts_of(self, call: KeptCall) -> int:
        """Returns how many copies of the latents the batch of a call consists of."""
        return call.leaves[self.streams[0].leaf].shape[0] // self.batch

    def inputs(self, step: int) -> Vector:
        """Returns the latents that the model is given at a step."""
        leaves = next(iter(self.calls[step].values())).leaves
        return [self.latents_of(leaves, stream) for stream in range(len(self.streams))]

    def latents_of(self, leaves: Sequence[Any], stream: int) -> torch.Tensor:
        """Returns the latents in the arguments of another call, as :meth:`inputs` does."""
        found = self.streams[stream]
        output = next(iter(self.calls[0].values())).outputs[found.output]
        return _latents(leaves[found.leaf], output, found, self)

    def outputs(self, step: int, name: str, outputs: Sequence[torch.Tensor]) -> dict[str, Vector]:
        """Returns the vectors of each branch in the result of a call, by branch."""
        call = self.calls[step][name]
        found: dict[str, Vector] = {}
        parts = self.parts_of(call)
        for part in range(parts):
            found[branch_of(name, part, parts)] = [
                _part(outputs[s.output], call.leaves[s.leaf], self, part) for s in self.streams
            ]
        return found

    def with_inputs(self, step: int, name: str, latents: Vector) -> tuple[Any, ...]:
        """Returns the arguments, `(args, kwargs)`, of a call that is given other latents."""
        call = self.calls[step][name]
        leaves = list(call.leaves)
        for stream, x in zip(self.streams, latents, strict=True):
            whole = leaves[stream.leaf] = leaves[stream.leaf].clone()
            for part in range(self.parts_of(call)):
                _latents(whole, call.outputs[stream.output], stream, self, part).copy_(x)
        args, kwargs = call.structure.unflatten(leaves)
        return args, kwargs


class Hearing:
    """Keeps the calls of one generation until its end."""

    def __init__(self) -> None:
        self._calls: dict[int, dict[str, KeptCall]] = {}

    @property
    def num_steps(self) -> int:
        """The number of steps that were heard so far."""
        return len(self._calls)

    @property
    def nbytes(self) -> int:
        """The bytes of the copies that are held."""
        calls = chain.from_iterable(each.values() for each in self._calls.values())
        return sum(_copied_bytes(call) for call in calls)

    def first_leaves(self, step: int) -> list[Any] | None:
        """Returns the arguments of the first call of a step; None: it was not heard."""
        calls = self._calls.get(step)
        return None if calls is None else next(iter(calls.values())).leaves

    def hear(
        self,
        step: int,
        name: str,
        leaves: Sequence[Any],
        structure: Structure,
        result: Any,
        *,
        model: int = 0,
    ) -> None:
        """Keeps a call: its flattened arguments and its result.

        `name`: tells the calls of one step apart; `model`: which of several models was called.
        """
        outputs = find_outputs(result)
        kept = [_keep(leaf, outputs) for leaf in leaves]
        copies = [output.detach().clone() for output in outputs]
        versions, autocast = _versions(kept), active_autocast(kept)
        call = KeptCall(model, kept, structure, copies, versions, autocast)
        self._calls.setdefault(step, {})[name] = call

    def finish(
        self, timesteps: Iterable[float] | None = None, result: Vector | None = None
    ) -> HeardGeneration:
        """Returns the generation.

        Args:
            timesteps: one per step; None: the steps' indices.
            result: the final latents, if they are known.

        Raises ValueError if no argument is found that the outputs update, or a step is missing.
        """
        n = 1 + max(self._calls, default=-1)
        steps = tuple(range(n) if timesteps is None else map(float, timesteps))
        missing = [i for i in range(len(steps)) if i not in self._calls]
        if not steps or missing:
            raise ValueError(f"calls: expected some at each of {len(steps)} steps, found none")
        firsts = [next(iter(self._calls[i].values())) for i in range(n)]
        streams = find_streams(firsts)
        parts = count_parts([call.leaves[s.leaf] for call in firsts for s in streams])
        models = [call.model for call in firsts]
        starts = tuple(i for i, model in enumerate(models) if i == 0 or model != models[i - 1])
        heard = self.so_far(streams, parts)
        recorder = Recorder()
        for step, each in enumerate(heard.calls):
            recorder.add_input(step, heard.inputs(step))
            for name, call in each.items():
                for branch, vector in heard.outputs(step, name, call.outputs).items():
                    recorder.add_output(branch, step, vector)
        recording = recorder.finish(steps, result, starts=starts)
        return HeardGeneration(recording, heard.calls, streams, parts, result)

    def so_far(self, streams: tuple[Stream, ...], parts: int) -> HeardGeneration:
        """Returns the steps so far, without inner products, where it is known how to read them."""
        n = self.num_steps
        calls = tuple(self._calls[i] for i in range(n))
        empty = Recording(tuple(map(float, range(n))), (), np.zeros((n + 1, n + 1)))
        return HeardGeneration(empty, calls, streams, parts, None)


def name_call(name: str | None, order: int) -> str:
    """Returns a text for the calls of one name and order in each step."""
    shown = "model" if name is None else name
    return f"{shown}#{order}" if order else shown


def branch_of(name: str, part: int, parts: int) -> str:
    """Returns the name of the branch that a part of the batch of a call is."""
    return name if parts == 1 else f"{name}[{part}]"


def find_outputs(result: Any) -> list[torch.Tensor]:
    """Returns the floating-point tensors of a result."""
    leaves, _ = flatten(result)
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]


def find_streams(calls: Sequence[KeptCall]) -> tuple[Stream, ...]:
    """Returns, for each output that updates latents, where these are among the arguments.

    They are the first tensor that has the shape of the output, up to one dimension (the latents may
    have channels that the output lacks, and the output a predicted variance), and another value at
    each step; one of the very shape comes first. Raises ValueError if there is none.
    """
    first, found = calls[0], list[Stream]()
    for i, output in enumerate(first.outputs):
        taken = {stream.leaf for stream in found}
        alike = [k for k, x in enumerate(first.leaves) if k not in taken and is_like(x, output)]
        alike.sort(key=lambda k: first.leaves[k].shape != output.shape)
        moving = (k for k in alike if _moves([call.leaves[k] for call in calls]))
        leaf = next(moving, None)
        if leaf is not None:
            values = [call.leaves[leaf] for call in calls]
            found.append(Stream(leaf, i, _are_last(values, output)))
    if not found:
        shapes = ", ".join(str(tuple(output.shape)) for output in first.outputs) or "no tensor"
        is_zero = not any(bool(output.any()) for call in calls for output in call.outputs)
        zeros = ", and 0 in every call" if is_zero and first.outputs else ""
        raise ValueError(
            "latents: expected an argument of the shape of an output that changes at every step, "
            f"found none; the outputs are {shapes}{zeros}"
        )
    return tuple(found)


def is_like(x: Any, output: torch.Tensor) -> bool:
    """Returns whether `x` may be latents that `output` updates, by shapes and dtypes."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.ndim != output.ndim:
        return False
    differing = sum(a != b for a, b in zip(x.shape, output.shape, strict=True))
    return output.ndim > 1 and differing <= 1 and x.shape[0] == output.shape[0]


def count_parts(latents: Sequence[torch.Tensor]) -> int:
    """Returns of how many equal parts the batches of all these latents consist."""
    for parts in range(_MOST_PARTS, 1, -1):
        if all(_has_equal_parts(x, parts) for x in latents):
            return parts
    return 1


def _has_equal_parts(x: torch.Tensor, parts: int) -> bool:
    if x.shape[0] % parts:
        return False
    first, *others = x.chunk(parts)
    return all(torch.equal(first, other) for other in others)


def _moves(values: Sequence[Any]) -> bool:
    return all(a.shape == b.shape and not torch.equal(a, b) for a, b in pairwise(values))


def _are_last(values: Sequence[torch.Tensor], output: torch.Tensor) -> bool:
    """Returns whether latents are the last channels of an argument that has more than the output:
    a condition that stays as it is comes first."""
    first, second = values[0], values[min(1, len(values) - 1)]
    for dim in range(1, output.ndim):
        size, wanted = first.shape[dim], output.shape[dim]
        if size > wanted:
            others = [d for d in range(first.ndim) if d != dim]
            stays = (first == second).all(dim=others) if others else first == second
            return bool(stays[:wanted].any() and not stays[size - wanted :].any())
    return False


def _part(
    x: torch.Tensor, other: torch.Tensor, heard: HeardGeneration, part: int = 0
) -> torch.Tensor:
    """Returns a part of the batch, of the leading channels that `other` has too, as a view."""
    view = x.narrow(0, part * heard.batch, heard.batch)
    for dim in range(1, x.ndim):
        view = view.narrow(dim, 0, min(x.shape[dim], other.shape[dim]))
    return view


def _latents(
    x: torch.Tensor, output: torch.Tensor, stream: Stream, heard: HeardGeneration, part: int = 0
) -> torch.Tensor:
    """Returns the latents in a part of the batch of an argument, as a view."""
    if stream.is_trailing:
        for dim in range(1, x.ndim):
            size = min(x.shape[dim], output.shape[dim])
            x = x.narrow(dim, x.shape[dim] - size, size)
    return _part(x, output, heard, part)


def _keep(leaf: Any, outputs: Sequence[torch.Tensor]) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    is_copied = leaf.numel() <= _SMALL or any(is_like(leaf, output) for output in outputs)
    return leaf.detach().clone() if is_copied else leaf


def _copied_bytes(call: KeptCall) -> int:
    inputs = (x for x in call.leaves if any(is_like(x, output) for output in call.outputs))
    tensors: Iterator[torch.Tensor] = chain(call.outputs, inputs)
    return sum(tensor.nbytes for tensor in tensors)


def _versions(leaves: Iterable[Any]) -> tuple[int, ...]:
    tensors = (x for x in leaves if isinstance(x, torch.Tensor))
    return tuple(-1 if x.is_inference() else version_of(x) for x in tensors)
