"""Checks at the first steps of a generation that its sampler is the one that was recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pabc.automatic.plans import AutoPlan
from pabc.calibration.hearing import HeardGeneration, Hearing
from pabc.calibration.recording import Vector

TRANSITIONS = 3
"""The transitions that are checked: multistep samplers differ from others at the second."""
EXACT = 1e-3
"""The relative residual of a recorded transition up to which its sampler is taken for linear."""
ROUNDING = 2e-3
"""The relative residual up to which a transition of a linear sampler is as recorded."""
ROUGH = 0.05
"""The same for a sampler that rounds or clips."""
NOISY = 0.3
"""A recorded residual above which a sampler is too noisy to be told from another."""


class SamplerCheck:
    """Compares the first inputs of a generation with what the recorded sampler would make.

    Another sampler, or another guidance scale, makes others of the same outputs.
    """

    def __init__(self, plan: AutoPlan) -> None:
        self._plan = plan
        self._updates = plan.calibration.updates
        self._last = min(TRANSITIONS, self._updates.num_steps - 1)
        self._hearing: Hearing | None = Hearing()
        self._step = 0
        self._refused: tuple[int, Sequence[Any]] | None = None

    @property
    def is_over(self) -> bool:
        """True if nothing more is compared."""
        return self._hearing is None

    def end(self, step: int, name: str, leaves: Sequence[Any], structure: Any, result: Any) -> None:
        """Notes a call."""
        if self._hearing is not None and step < self._last:
            self._hearing.hear(step, name, leaves, structure, result)

    def begin(self, step: int, leaves: Sequence[Any]) -> str | None:
        """Compares the inputs of a step with what follows from those before.

        Returns how they differ, where they do by more than those of the recorded sampler.
        """
        if self._hearing is None or step <= self._step:
            return None
        self._step = step
        residual = self._compare(self._hearing, step, leaves)
        self._refused = step, leaves
        if residual is None:
            if step >= self._last:
                self._hearing = None
            return None
        return (
            f"expected the recorded sampler and guidance scale, found at step {step} latents that "
            f"differ by {residual:.1%} of their change from what it makes"
        )

    def accepts(self, other: AutoPlan) -> bool:
        """Returns whether what was refused is what the sampler of another plan makes."""
        if self._hearing is None or self._refused is None:
            return False
        check = SamplerCheck(other)
        if other.streams != self._plan.streams or other.parts != self._plan.parts:
            return False
        return check._compare(self._hearing, *self._refused) is None

    def _compare(self, hearing: Hearing, step: int, leaves: Sequence[Any]) -> float | None:
        expected = float(self._updates.residual[step - 1])
        if expected > NOISY or hearing.num_steps < step:
            return None  # there is nothing to compare
        plan = self._plan
        heard = hearing.so_far(plan.streams, plan.parts)
        found = [heard.latents_of(leaves, k) for k in range(len(plan.streams))]
        before = heard.inputs(step - 1)
        if any(a.shape != b.shape for a, b in zip(found, before, strict=True)):
            return None
        change = [a.double() - b.double() for a, b in zip(found, before, strict=True)]
        rest = [a.double() for a in found]
        for weight, vector in self._terms(heard, step - 1):
            rest = [r - weight * v.double() for r, v in zip(rest, vector, strict=True)]
        residual = _norm(rest) / max(_norm(change), 1e-30)
        allowed = ROUNDING if expected < EXACT else max(ROUGH, 3 * expected)
        return residual if residual > allowed else None

    def _terms(self, heard: HeardGeneration, step: int) -> list[tuple[float, Vector]]:
        inputs, outputs = self._updates.inputs[step], self._updates.outputs[step]
        branches = self._plan.calibration.recording.branches
        terms: list[tuple[float, Vector]] = []
        for lag in range(min(len(inputs), step + 1)):
            terms.append((float(inputs[lag]), heard.inputs(step - lag)))
            for name, call in heard.calls[step - lag].items():
                for branch, vector in heard.outputs(step - lag, name, call.outputs).items():
                    if branch in branches:
                        weight = float(outputs[branches.index(branch), lag])
                        terms.append((weight, vector))
        return terms


def _norm(vector: Vector) -> float:
    return float(torch.stack([x.square().sum() for x in vector]).sum().sqrt())
