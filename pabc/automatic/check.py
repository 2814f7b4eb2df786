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


def opening(plan: AutoPlan) -> int:
    """Returns how many steps at the start of a generation are computed, and compared."""
    mask = plan.schedule.mask("model")
    skipped = next((i for i, is_skipped in enumerate(mask) if is_skipped), len(mask))
    return min(TRANSITIONS, skipped)


def find_difference(
    plan: AutoPlan, hearing: Hearing, step: int, leaves: Sequence[Any]
) -> float | None:
    """Returns how the latents of a step differ from what the recorded sampler would make.

    Another sampler, or another guidance scale, makes others of the same outputs.

    Args:
        plan: whose sampler it is.
        hearing: all steps before this one.
        step, leaves: the step that is about to run, and the arguments of its first call.

    Returns the relative residual, where it is larger than that of the recorded sampler; else None.
    """
    updates = plan.calibration.updates
    if not 0 < step < updates.num_steps or hearing.num_steps < step:
        return None
    expected = float(updates.residual[step - 1])
    if expected > NOISY:
        return None
    heard = hearing.so_far(plan.streams, plan.parts)
    found = [heard.latents_of(leaves, k) for k in range(len(plan.streams))]
    before = heard.inputs(step - 1)
    if any(a.shape != b.shape for a, b in zip(found, before, strict=True)):
        return None
    change = [a.double() - b.double() for a, b in zip(found, before, strict=True)]
    rest = [a.double() for a in found]
    for weight, vector in _terms(plan, heard, step - 1):
        rest = [r - weight * v.double() for r, v in zip(rest, vector, strict=True)]
    residual = _norm(rest) / max(_norm(change), 1e-30)
    allowed = max(plan.slack, ROUNDING if expected < EXACT else max(ROUGH, 3 * expected))
    return residual if residual > allowed else None


def explains(plan: AutoPlan, hearing: Hearing, step: int, leaves: Sequence[Any]) -> bool:
    """Returns whether the sampler of a plan makes the latents of this step and of those before."""
    for earlier in range(1, step):
        kept = hearing.first_leaves(earlier)
        if kept is None or find_difference(plan, hearing, earlier, kept) is not None:
            return False
    return find_difference(plan, hearing, step, leaves) is None


def describe_difference(step: int, residual: float) -> str:
    """Returns a difference as text."""
    return (
        f"expected the recorded sampler and guidance scale, found at step {step} latents that "
        f"differ by {residual:.1%} of their change from what it makes"
    )


def _terms(plan: AutoPlan, heard: HeardGeneration, step: int) -> list[tuple[float, Vector]]:
    updates, branches = plan.calibration.updates, plan.calibration.recording.branches
    inputs, outputs = updates.inputs[step], updates.outputs[step]
    terms: list[tuple[float, Vector]] = []
    for lag in range(min(len(inputs), step + 1)):
        terms.append((float(inputs[lag]), heard.inputs(step - lag)))
        for name, call in heard.calls[step - lag].items():
            for branch, vector in heard.outputs(step - lag, name, call.outputs).items():
                if branch in branches:
                    terms.append((float(outputs[branches.index(branch), lag]), vector))
    return terms


def _norm(vector: Vector) -> float:
    return float(torch.stack([x.square().sum() for x in vector]).sum().sqrt())
