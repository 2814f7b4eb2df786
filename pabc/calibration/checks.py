"""Checks that a run by a plan is the recorded generation but for the plan."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence

import torch

from pabc.calibration.subject import Run, Subject
from pabc.calibration.watch import COMPUTED, differ

Opening = Mapping[int, Sequence[torch.Tensor]]
"""Step -> numbers out of the inputs of its first call; see :class:`Watch`."""


def check_calls(run: Run) -> None:
    """Raises ValueError for a generation that did not call the model."""
    if not run.watch.full and not run.watch.skipped:
        raise ValueError(
            "sample: expected it to call the model that it is given, found no call; "
            "`sample(model, seed)` is to use its first argument"
        )


def check_skips(run: Run, skipped: Collection[int], subject: Subject) -> None:
    """Raises ValueError for a run that has computed calls of steps that the plan skips."""
    lacking = [step for step in sorted(skipped) if not run.watch.num_skipped[step]]
    if lacking:
        raise ValueError(
            f"sample: expected the calls of {len(skipped)} steps to be skipped, found that "
            f"those of {len(lacking)} were computed, step {lacking[0]} first; reasons: "
            f"{subject.fallbacks() or 'none'}"
        )


def check_noise(run: Run, opening: Opening, seed: int) -> int | None:
    """Compares the first inputs of two generations of one seed.

    Returns the step at which they differ though the noise is the same; None: they do not. Raises
    ValueError for other noise.
    """
    for step, inputs in opening.items():
        if step > COMPUTED:
            break
        if step in run.watch.opening and differ(inputs, run.watch.opening[step]):
            if step:
                return step
            raise ValueError(
                f"sample: expected the same inputs at step 0 whenever the seed is {seed}, "
                "found others: draw the noise from a generator with that seed"
            )
    return None


def warn_of_chance(seed: int, step: int) -> None:
    """Warns of random numbers that a seed does not fix."""
    warnings.warn(
        f"pabc: two generations with seed {seed} differ at step {step}, before anything "
        "was skipped: the scheduler or the model draws random numbers that the seed does "
        "not fix. What is measured is that difference too; pass a generator, or take a "
        "scheduler without noise",
        stacklevel=6,
    )
