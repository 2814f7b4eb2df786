"""Runs a recorded generation again under a plan, without the sampler that made it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from pabc.calibration.clipping import Clip, find_clip
from pabc.calibration.hearing import HeardGeneration, KeptCall, find_outputs
from pabc.calibration.recording import Vector
from pabc.calibration.updates import Updates
from pabc.runtime.autocast import with_autocast

MakeCall = Callable[[int, str, int, tuple[Any, ...], dict[str, Any]], Any]
"""Calls model `index` at a step, under a name: `(step, name, index, args, kwargs) -> result`."""


LINEAR = 0.01
"""The relative residual up to which a transition is taken for linear."""
SAME = 1e-3
"""The relative difference up to which outputs are those of the same model, in float32: mostly,
the same code runs again, and they are equal."""


@dataclass(frozen=True)
class Replayed:
    """The outcome of a generation that was run by a plan.

    Attributes:
        errors: [n + 1] root mean squared difference of the inputs, and of the result, from those
            of the recorded generation.
        seconds: [n] of the calls of each step.
    """

    errors: np.ndarray
    seconds: np.ndarray


class Replay:
    """Runs a recorded generation again.

    The sampler is not called. What it would give is the recorded input plus the difference that
    other outputs make. This is linear in them, or, where a transition is told to clip, follows from
    how it does; noise that a sampler adds is that of the recording.
    """

    def __init__(self, heard: HeardGeneration, sampler: Updates) -> None:
        self._heard, self._sampler = heard, sampler
        recording = heard.recording
        self._branches = {name: i for i, name in enumerate(recording.branches)}
        self._shares = sampler.shares()

    @cached_property
    def _clips(self) -> dict[int, Clip]:
        """The clipping of transitions that are not linear, by step."""
        found = {}
        for step in np.flatnonzero(self._sampler.residual[:-1] > LINEAR).tolist():
            following = self._heard.inputs(step + 1)
            clip = find_clip(self._heard.inputs(step), self._recorded(step), following)
            if clip is not None:
                found[step] = clip
        return found

    @property
    def residual(self) -> np.ndarray:
        """The relative residuals of the transitions, [n], as they are taken here."""
        found = self._sampler.residual.copy()
        for step, clip in self._clips.items():
            found[step] = min(found[step], clip.residual)
        return found

    @property
    def can_run(self) -> bool:
        """True if the arguments are still those that were recorded."""
        return all(call.is_intact for calls in self._heard.calls for call in calls.values())

    @torch.no_grad()
    def run(self, call: MakeCall) -> Replayed:
        """Makes the calls of all steps, and returns how far the inputs came from the recorded."""
        heard = self._heard
        n = heard.recording.num_steps
        errors, seconds = np.zeros(n + 1), np.zeros(n)
        strayed: list[Vector] = [
            [torch.zeros_like(x, dtype=torch.float32) for x in heard.inputs(0)]
        ]
        history: list[dict[str, Vector]] = []
        generator = torch.Generator(strayed[0][0].device).manual_seed(0)
        for step in range(n):
            recorded = heard.inputs(step)
            pairs = zip(recorded, strayed[0], strict=True)
            latents = [_add_rounded(x, d, generator) for x, d in pairs]
            both = zip(latents, recorded, strict=True)
            strayed[0] = [a.float() - b.float() for a, b in both]
            found: dict[str, Vector] = {}
            for name, kept in heard.calls[step].items():
                args, kwargs = heard.with_inputs(step, name, latents)
                start = _now(latents)
                with with_autocast(kept.autocast, kept.leaves):
                    outputs = find_outputs(call(step, name, kept.model, args, kwargs))
                seconds[step] += _now(latents) - start
                made = heard.outputs(step, name, outputs)
                before = heard.outputs(step, name, kept.outputs)
                for branch, vector in made.items():
                    pairs = zip(vector, before[branch], strict=True)
                    found[branch] = [a.float() - b.float() for a, b in pairs]
            history.insert(0, found)
            strayed.insert(0, self._update(step, strayed, history))
            errors[step + 1] = _rms(strayed[0])
            lags = self._sampler.outputs.shape[-1]
            del strayed[lags:], history[lags:]
        return Replayed(errors, seconds)

    @torch.no_grad()
    def find_difference(self, step: int, call: MakeCall) -> float | None:
        """Makes the calls of a step again, and returns the least relative root mean squared
        difference of their outputs from the recorded ones.

        None: a call gave what it gave, so that the model is the same. Others of the step may
        differ: guiders set hooks for one call, and remove them after it. The model may round
        differently, or draw random numbers: then two more runs differ as well.
        """
        found = []
        for name in self._heard.calls[step]:
            difference = self._find_difference(step, name, call)
            if difference is None:
                return None
            found.append(difference)
        return min(found, default=None)

    def _find_difference(self, step: int, name: str, call: MakeCall) -> float | None:
        kept = self._heard.calls[step][name]
        found = self._make_again(step, name, call)
        if [x.shape for x in found] != [x.shape for x in kept.outputs]:
            return float("inf")
        size = max(_rms(kept.outputs), 1e-30)
        difference = _rms_of_difference(found, kept.outputs) / size
        if not difference > _rounding(kept):
            return None
        chance = _rms_of_difference(found, self._make_again(step, name, call)) / size
        return difference if difference > 2 * chance else None

    def _make_again(self, step: int, name: str, call: MakeCall) -> Vector:
        kept = self._heard.calls[step][name]
        args, kwargs = self._heard.with_inputs(step, name, self._heard.inputs(step))
        with with_autocast(kept.autocast, kept.leaves):
            outputs = find_outputs(call(step, name, kept.model, args, kwargs))
        return [output.clone() for output in outputs]

    def _recorded(self, step: int) -> Vector:
        """Returns the guided output of a step of the recording."""
        outputs: dict[str, Vector] = {}
        for name, call in self._heard.calls[step].items():
            outputs |= self._heard.outputs(step, name, call.outputs)
        return self._guide(step, outputs)

    def _guide(self, step: int, outputs: Mapping[str, Vector]) -> Vector:
        """Returns the guided output of a step, a sum of the branches."""
        found: Vector = []
        for branch, vector in outputs.items():
            weight = float(self._shares[step, self._branches[branch]])
            parts = [weight * part.float() for part in vector]
            found = [a + b for a, b in zip(found, parts, strict=True)] if found else parts
        return found

    def _update(self, step: int, strayed: list[Vector], history: list[dict[str, Vector]]) -> Vector:
        """Returns the difference of the next inputs from the recorded ones."""
        clip = self._clips.get(step)
        if clip is not None:
            recorded = [x.float() for x in self._heard.inputs(step)]
            changes = strayed[0], self._guide(step, history[0])
            return clip.change(recorded, self._recorded(step), *changes)
        inputs, outputs = self._sampler.inputs[step], self._sampler.outputs[step]
        result: Vector = [torch.zeros_like(d) for d in strayed[0]]
        for lag in range(min(outputs.shape[-1], len(history))):
            result = _add(result, float(inputs[lag]), strayed[lag])
            for branch, vector in history[lag].items():
                result = _add(result, float(outputs[self._branches[branch], lag]), vector)
        return result


def _add(total: Vector, weight: float, vector: Vector) -> Vector:
    if not weight:
        return total
    return [d + weight * v for d, v in zip(total, vector, strict=True)]


def _add_rounded(x: torch.Tensor, difference: torch.Tensor, generator: Any) -> torch.Tensor:
    """Returns the sum in the dtype of `x`, rounded at random where that has few digits.

    Latents that are kept in such a dtype are rounded at every step, and a small difference decides
    which way: on average it is kept, though it is less than a digit.
    """
    exact = x.float() + difference
    if x.dtype.itemsize > 2 or not difference.any():
        return exact.to(x.dtype)
    noise = torch.rand(exact.shape, generator=generator, device=exact.device) - 0.5
    digit = torch.ldexp(torch.full_like(exact, torch.finfo(x.dtype).eps / 2), exact.frexp()[1])
    return (exact + noise * digit).to(x.dtype)


def _rms(vector: Vector) -> float:
    total = sum(float(x.double().square().sum()) for x in vector)
    return float(np.sqrt(total / max(1, sum(x.numel() for x in vector))))


def _rounding(call: KeptCall) -> float:
    """Returns the relative difference up to which outputs of a call are those of one model."""
    dtypes = [x.dtype for x in call.outputs] + [dtype for _, dtype in call.autocast]
    return max([SAME, *(2 * torch.finfo(dtype).eps for dtype in dtypes)])


def _rms_of_difference(a: Vector, b: Vector) -> float:
    return _rms([x.float() - y.float() for x, y in zip(a, b, strict=True)])


def _now(tensors: Vector) -> float:
    """Returns the time when the device of the tensors has done all that was asked of it."""
    if tensors[0].is_cuda:
        torch.cuda.synchronize(tensors[0].device)
    return time.perf_counter()
