"""Makes diffusers' Latte of any size as a workload, and its schedule."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import workloads
from workloads import FRACTION, Workload

import pabc

NUM_HEADS = 4


def make_latte(
    *, depth: int, width: int, frames: int = 4, side: int = 16, num_clips: int = 1
) -> Workload:
    """Returns a Latte with `depth` blocks of each kind, 2 x 2 patches of `side` x `side` latents.

    Guidance doubles the clips: the model is given 2 `num_clips`.
    """
    base = workloads.TINY["latte"]
    configured: Any = base.build
    build = partial(
        configured,
        num_layers=depth,
        num_attention_heads=NUM_HEADS,
        attention_head_dim=width // NUM_HEADS,
        cross_attention_dim=width,
        sample_size=side,
        video_length=frames,
    )
    return replace(base, build=build, latents=(4, frames, side, side), num_clips=num_clips)


def make_schedule(workload: Workload, num_steps: int) -> pabc.Schedule:
    """Returns the schedule 2/4/6 over the middle 70 % of the steps."""
    steps = workloads.timesteps(workload, num_steps)
    return pabc.Schedule.pyramid(steps, fraction=FRACTION, **workload.ranges)
