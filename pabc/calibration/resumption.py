"""Checks that notes which are resumed are of the generation that `sample` runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch

from pabc.calibration.notes import Reference
from pabc.calibration.subject import FirstSteps, Sample, Subject
from pabc.calibration.watch import differ

TOLERANCE = 0.02
"""The share of the change of an input since the step before by which it may differ."""


def check_resumed(
    subject: Subject, sample: Sample, seed: int, reference: Reference, path: Path | None
) -> None:
    """Runs the first steps of a recorded generation again, and compares them with the notes.

    If they differ, they are run once more: what differs by chance is not the notes' fault.

    Raises ValueError if the generation is another one: of other prompts, noise or shapes, with
    another precision, sampler, guidance scale or number of steps, as far as the first steps show.
    """
    last = max(reference.opening)
    found = subject.open(sample, seed, last)
    difference = find_difference(reference, found)
    if difference is None:
        return
    again = subject.open(sample, seed, last)
    chance = [step for step in found.inputs if differ(found.inputs[step], again.inputs[step])]
    if 0 in chance:
        raise ValueError(
            f"sample: expected the same inputs at step 0 whenever the seed is {seed}, found "
            "others: draw the noise from a generator with that seed"
        )
    if not chance:
        raise ValueError(
            f"resume: expected the generation that was recorded in {path} with seed {seed}, found "
            f"{difference}; use another file for another `sample`"
        )


def find_difference(reference: Reference, found: FirstSteps) -> str | None:
    """Returns in what the first steps of a generation are not the recorded ones, as text."""
    if reference.precision and found.precision != reference.precision:
        return f"{found.precision} where there was {reference.precision}"
    recorded = reference.recording.timesteps
    if found.is_whole and len(found.timesteps) != len(recorded):
        return f"{len(found.timesteps)} steps where there were {len(recorded)}"
    known = recorded[: len(found.timesteps)]
    if not np.allclose(found.timesteps, known, rtol=1e-4, atol=1e-6):
        pairs = zip(found.timesteps, known, strict=True)
        now, then = next((a, b) for a, b in pairs if not np.isclose(a, b, rtol=1e-4, atol=1e-6))
        return f"timestep {now:g} where there was {then:g}"
    for step, inputs in sorted(reference.opening.items()):
        before = reference.opening.get(step - 1, [])
        if step in found.inputs and _are_other(found.inputs[step], inputs, before):
            reason = "sampler or guidance scale" if step else "prompts, noise or shapes"
            return f"other inputs at step {step} (other {reason})"
    return None


def _are_other(
    now: Sequence[torch.Tensor], then: Sequence[torch.Tensor], before: Sequence[torch.Tensor]
) -> bool:
    """Returns whether inputs are others than they were, measured by their change since `before`."""
    if [len(part) for part in now] != [len(part) for part in then]:
        return True
    for a, b, earlier in zip_longest(now, then, before):
        moved = float((b - earlier).norm()) if earlier is not None and len(earlier) == len(b) else 0
        if float((a - b).norm()) > TOLERANCE * (moved or float(b.norm())):
            return True
    return False
