"""Makes the variants that the demo compares: the full model, fewer steps, and reuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch.distributed.device_mesh import DeviceMesh

import pabc
from pabc import presets
from pabc.demo import sampling
from pabc.demo.latte import Demo
from pabc.demo.timing import Variant
from pabc.schedule import Schedule

FULL = "full"
TORCH_COMPILE = "torch.compile"
NO_REUSE = "pabc, no reuse"
PYRAMID = "pabc 2/4/6"
FRACTION = (0.15, 0.85)
"""The share of the steps, the middle 70 %, in which the 2/4/6 variant reuses."""
FEWER = (0.8, 0.5)
"""The shares of the steps that the variants with fewer steps take."""


def name_skip(steps: int) -> str:
    """Returns the name of the variant that computes half of the calls, and skips the others."""
    return f"skip {steps / count_half(steps):.2g}x"


def count_half(steps: int) -> int:
    """Returns half of the steps, rounded up."""
    return (steps + 1) // 2


@dataclass(frozen=True)
class Reuse:
    """A schedule of the demo, and its description for readers."""

    schedule: Schedule
    about: str


def make_variants(
    demo: Demo,
    *,
    steps: int,
    backend: Literal["inductor", "eager"],
    mlp: bool = False,
    mesh: DeviceMesh | None = None,
) -> list[Variant]:
    """Returns the variants, the full model first.

    They are the full model, torch.compile of it with all and with fewer steps, and pabc without
    reuse and with some schedules. With a mesh, there are more, which run on all its processes.
    """
    timesteps = sampling.timesteps(demo, steps)
    reuse = make_schedules(timesteps, mlp=mlp)
    variants = make_baselines(demo, timesteps, backend)
    variants += [
        Variant(
            name,
            pabc.compile(demo.transformer, each.schedule, backend=backend),
            each.about,
            timesteps=timesteps,
            whole=NO_REUSE,
        )
        for name, each in reuse.items()
    ]
    return variants + (shard_variants(demo, reuse, timesteps, backend, mesh) if mesh else [])


def make_baselines(demo: Demo, timesteps: tuple[int, ...], backend: str) -> list[Variant]:
    """Returns the variants without pabc: all steps, eager and compiled, then fewer, compiled."""
    model, steps = demo.transformer, len(timesteps)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    about = f"torch.compile of the full model, fullgraph=True, backend={backend}"
    variants = [
        Variant(
            FULL,
            model,
            "the full model, eager",
            timesteps=timesteps,
            whole=FULL,
            is_compiled=False,
        ),
        Variant(TORCH_COMPILE, compiled, about, timesteps=timesteps, whole=TORCH_COMPILE),
    ]
    counts = {max(1, round(share * steps)): None for share in FEWER}
    return variants + [
        Variant(
            f"{num} step{'s' * (num > 1)}",
            compiled,
            f"the same sampler with {num} steps instead of {steps}, by {TORCH_COMPILE}: what reuse"
            " has to beat",
            timesteps=sampling.timesteps(demo, num),
            whole=TORCH_COMPILE,
            is_compiled=False,
        )
        for num in counts
        if num < steps
    ]


def make_schedules(timesteps: tuple[int, ...], *, mlp: bool) -> dict[str, Reuse]:
    """Returns the schedules of pabc's variants by name, first the one that reuses nothing."""
    found = {
        NO_REUSE: Reuse(
            Schedule.none(timesteps),
            "everything runs: pabc's formulas and products, against which reuse is measured",
        ),
        "pabc 2/3/6": Reuse(
            presets.latte(timesteps, mlp=False),
            "the published Latte preset, without its MLP broadcast",
        ),
        PYRAMID: Reuse(
            Schedule.pyramid(timesteps, spatial=2, temporal=4, cross=6, fraction=FRACTION),
            "spatial, temporal, cross attention, in the middle 70 % of the steps",
        ),
    }
    steps, half = len(timesteps), count_half(len(timesteps))
    found[name_skip(steps)] = Reuse(
        Schedule.skip(timesteps, half),
        f"{half} of {steps} calls are computed, the first and the last ones among them; the others"
        " are skipped, and their outputs forecast by lines",
    )
    if mlp:
        found["pabc 2/3/6 + mlp"] = Reuse(
            presets.latte(timesteps), "the published Latte preset with its MLP broadcast"
        )
    return found


def shard_variants(
    demo: Demo,
    reuse: Mapping[str, Reuse],
    timesteps: tuple[int, ...],
    backend: str,
    mesh: DeviceMesh,
) -> list[Variant]:
    """Returns variants that run on all processes of the mesh."""
    suffix = f", {mesh.size()} ranks"
    return [
        Variant(
            f"{name}{suffix}",
            pabc.compile(demo.transformer, reuse[name].schedule, backend=backend, mesh=mesh),  # type: ignore[arg-type]
            f"sharded over {mesh.size()} processes",
            timesteps=timesteps,
            whole=f"{NO_REUSE}{suffix}",
            ranks=mesh.size(),
        )
        for name in (NO_REUSE, PYRAMID, name_skip(len(timesteps)))
    ]
