"""Published Pyramid Attention Broadcast settings, for any number of steps.

Each preset takes the timesteps that will be run and returns a `Schedule`. Ranges and windows (in
timestep units) are those that the authors of the method published per model (arXiv 2408.12588 and
its released code), from the model's usual number of steps.

MLP broadcast was published as exact timesteps ("keys"): a key step computes and stores the MLPs of
the first blocks, the next two steps reuse them, a step that is itself a key always computes. With
another number of steps no timestep might equal a key, so that the reuse would silently disappear.
Here a key stands for a position: the step of the nearest timestep, the first of them on a tie. Keys
that fall on the same step count once, and a key beyond the timesteps run (a generation that starts
midway) counts not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from pabc.schedule import Schedule
from pabc.validate import as_timesteps

MLP_SKIP_COUNT = 2
"""Steps after a key that reuse its MLP outputs."""


def opensora12(timesteps: Iterable[float], *, mlp: bool = True) -> Schedule:
    """Returns the schedule of Open-Sora 1.2, published for 30 steps of rectified flow."""
    steps = as_timesteps(timesteps)
    schedule = Schedule.pyramid(steps, spatial=2, temporal=4, cross=6, window=(450, 930))
    return _broadcast_mlp(schedule, (864, 788, 676), num_blocks=5) if mlp else schedule


def opensora_plan11(timesteps: Iterable[float], *, mlp: bool = True) -> Schedule:
    """Returns the schedule of Open-Sora-Plan 1.1, published for 150 steps."""
    steps = as_timesteps(timesteps)
    schedule = Schedule.pyramid(steps, spatial=2, temporal=4, cross=6, window=(100, 850))
    return _broadcast_mlp(schedule, range(738, 425, -24), num_blocks=7) if mlp else schedule


def opensora_plan12(timesteps: Iterable[float], *, mlp: bool = True) -> Schedule:
    """Returns the schedule of Open-Sora-Plan 1.2 (full 3D attention), without MLP broadcast."""
    return Schedule.pyramid(timesteps, full=2, cross=6, window=(100, 850))


def latte(timesteps: Iterable[float], *, mlp: bool = True) -> Schedule:
    """Returns the schedule of Latte text-to-video, published for 50 steps."""
    steps = as_timesteps(timesteps)
    schedule = Schedule.pyramid(steps, spatial=2, temporal=3, cross=6, window=(100, 800))
    return _broadcast_mlp(schedule, (720, 640, 560, 480, 400), num_blocks=5) if mlp else schedule


def cogvideox(timesteps: Iterable[float], *, mlp: bool = True) -> Schedule:
    """Returns the schedule of CogVideoX (joint attention), without MLP broadcast."""
    return Schedule.pyramid(timesteps, joint=2, window=(100, 850))


def vchitect2(timesteps: Iterable[float], *, mlp: bool = True) -> Schedule:
    """Returns the schedule of Vchitect 2.0, published for 100 steps, without MLP broadcast."""
    return Schedule.pyramid(timesteps, spatial=2, temporal=4, cross=6, window=(100, 800))


PRESETS: Mapping[str, Callable[..., Schedule]] = MappingProxyType(
    {
        preset.__name__: preset
        for preset in (opensora12, opensora_plan11, opensora_plan12, latte, cogvideox, vchitect2)
    }
)
"""The presets by name."""


def get(name: str) -> Callable[..., Schedule]:
    """Returns the preset of that name. Raises `ValueError` on an unknown one."""
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, found {name!r}")
    return PRESETS[name]


def _broadcast_mlp(schedule: Schedule, keys: Sequence[float], *, num_blocks: int) -> Schedule:
    """Adds the reuse of the MLPs of the first blocks after each key.

    A block here is one spatial and then one temporal block, each with its MLP: blocks 0 to n - 1
    hold the MLPs 0 to 2n - 1 in execution order.
    """
    mask = _find_mlp_mask(schedule.timesteps, keys)
    broadcast = schedule.override(kind="mlp", layers=range(2 * num_blocks), mask=mask)
    label = f"{schedule.label} mlp keys={','.join(f'{key:g}' for key in keys)}"
    return replace(broadcast, label=label)


def _find_mlp_mask(timesteps: tuple[float, ...], keys: Sequence[float]) -> list[bool]:
    key_steps = {
        min(range(len(timesteps)), key=lambda step: abs(timesteps[step] - key))
        for key in keys
        if min(timesteps) <= key <= max(timesteps)
    }
    return [
        step not in key_steps
        and any(step - back in key_steps for back in range(1, MLP_SKIP_COUNT + 1))
        for step in range(len(timesteps))
    ]
