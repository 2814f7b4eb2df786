"""Makes the variants that the demo compares: the full model, fewer steps, reuse, and forecasts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch.distributed.device_mesh import DeviceMesh

import pabc
from pabc.demo.calibrated import Calibrated, count_calls
from pabc.demo.model import Model, Reuse
from pabc.demo.timing import Variant
from pabc.schedule import Schedule

FULL = "full"
TORCH_COMPILE = "torch.compile"
NO_REUSE = "pabc, no reuse"
FEWER = (0.8, 0.5)
"""The shares of the steps that the variants with fewer steps take."""


def name_skip(steps: int) -> str:
    """Returns the name of the variant that computes half of the calls, and skips the others."""
    return f"skip {steps / count_half(steps):.2g}x"


def count_half(steps: int) -> int:
    """Returns half of the steps, rounded up."""
    return (steps + 1) // 2


def make_variants(
    model: Model,
    *,
    steps: int,
    backend: Literal["inductor", "eager"],
    mlp: bool = False,
    mesh: DeviceMesh | None = None,
    calibrated: Calibrated | None = None,
) -> list[Variant]:
    """Returns the variants, the full model first.

    They are the full model, torch.compile of it with all and with fewer steps, and pabc without
    reuse and with some schedules. With a mesh, there are more, which run on all its processes.
    Without `calibrated`, calibrated variants compute all steps: for processes that do not run them.
    """
    timesteps = model.timesteps(steps)
    reuse = make_schedules(model, timesteps, mlp=mlp, calibrated=calibrated)
    variants = make_baselines(model, timesteps, backend)
    variants += [
        Variant(
            name,
            pabc.compile(model.transformer, each.schedule, backend=backend),
            each.about,
            timesteps=timesteps,
            whole=NO_REUSE,
        )
        for name, each in reuse.items()
    ]
    return variants + (shard_variants(model, reuse, timesteps, backend, mesh) if mesh else [])


def make_baselines(model: Model, timesteps: tuple[float, ...], backend: str) -> list[Variant]:
    """Returns the variants without pabc: all steps, eager and compiled, then fewer, compiled."""
    transformer, steps = model.transformer, len(timesteps)
    compiled = torch.compile(transformer, fullgraph=True, backend=backend)
    about = f"torch.compile of the full model, fullgraph=True, backend={backend}"
    variants = [
        Variant(
            FULL,
            transformer,
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
            timesteps=model.timesteps(num),
            whole=TORCH_COMPILE,
            is_compiled=False,
        )
        for num in counts
        if num < steps
    ]


def make_schedules(
    model: Model,
    timesteps: tuple[float, ...],
    *,
    mlp: bool,
    calibrated: Calibrated | None = None,
) -> dict[str, Reuse]:
    """Returns the schedules of pabc's variants by name, first the one that reuses nothing."""
    none, steps, half = Schedule.none(timesteps), len(timesteps), count_half(len(timesteps))
    pyramids = model.pyramids(timesteps, mlp=mlp)
    own = list(model.pyramids(timesteps, mlp=False))
    found = {
        NO_REUSE: Reuse(
            none,
            "everything runs: pabc's formulas and products, against which reuse is measured",
        ),
        **{name: each for name, each in pyramids.items() if name not in own[:-1]},
    }
    found[name_skip(steps)] = Reuse(
        Schedule.skip(timesteps, half),
        f"{half} of {steps} calls are computed, the first and the last ones among them; the others"
        " are skipped, and their outputs forecast by lines",
    )
    for name, calls in count_calls(steps).items():
        found[name] = Reuse(
            calibrated.schedule(name) if calibrated else none,
            f"{calls} of {steps} calls, as pabc.calibrate chose them on other captions and noise;"
            " the others are forecast by fitted weights",
        )
    return found


def shard_variants(
    model: Model,
    reuse: Mapping[str, Reuse],
    timesteps: tuple[float, ...],
    backend: str,
    mesh: DeviceMesh,
) -> list[Variant]:
    """Returns variants that run on all processes of the mesh."""
    suffix = f", {mesh.size()} ranks"
    pyramid = list(model.pyramids(timesteps, mlp=False))[-1]
    return [
        Variant(
            f"{name}{suffix}",
            pabc.compile(model.transformer, reuse[name].schedule, backend=backend, mesh=mesh),  # type: ignore[arg-type]
            f"sharded over {mesh.size()} processes",
            timesteps=timesteps,
            whole=f"{NO_REUSE}{suffix}",
            ranks=mesh.size(),
        )
        for name in (NO_REUSE, pyramid, name_skip(len(timesteps)))
    ]
