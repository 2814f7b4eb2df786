"""Makes the samplers that benchmarks compare, for models of either kind of noise schedule.

A model that predicts velocities of a variance-preserving process (the digits) is sampled by DDIM,
which clips as the demo does, DPM-Solver++, UniPC and DEIS; a rectified flow (the emoji) by Euler's
and Heun's methods and the same solvers. Heun's method calls the model twice a step, but once in the
last one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers

SOLVERS = ("DPM-Solver++ 2M", "DPM-Solver++ 3M", "UniPC", "DEIS")


@dataclass(frozen=True)
class Sampler:
    """A scheduler, the number of its steps, and the number of calls that they make."""

    name: str
    scheduler: Any
    num_steps: int

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The timestep of each call."""
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(self.num_steps)
        return tuple(float(t) for t in scheduler.timesteps)


def is_flow(base: Any) -> bool:
    """Returns True for the scheduler of a rectified flow."""
    return isinstance(base, diffusers.FlowMatchEulerDiscreteScheduler)


def name_samplers(base: Any) -> tuple[str, ...]:
    """Returns the names of the samplers for a model with this scheduler, its own first."""
    return ("Euler", "Heun", *SOLVERS) if is_flow(base) else ("DDIM", *SOLVERS)


def name_fine(base: Any, name: str) -> str:
    """Returns the sampler whose fine solution the sampler of this name approaches."""
    if is_flow(base):
        return "Euler"
    return "DDIM" if name == "DDIM" else "DDIM, not clipped"


def make_sampler(base: Any, name: str, calls: int, shift: float | None = None) -> Sampler:
    """Returns the sampler of this name that makes about so many calls.

    Args:
        base: the model's own scheduler.
        name: one of `name_samplers`, or `name_fine`.
        calls: as many are made, but by Heun's method, which makes an odd number: one less.
        shift: of a rectified flow's timesteps; None: the model's own.
    """
    if not is_flow(base):
        return Sampler(name, _make_diffusion(base, name), calls)
    shift = base.config.shift if shift is None else shift
    steps = (calls + 1) // 2 if name == "Heun" else calls
    return Sampler(name, _make_flow(base, name, shift), steps)


def _make_diffusion(base: Any, name: str) -> Any:
    if name.startswith("DDIM"):
        return diffusers.DDIMScheduler.from_config(base.config, clip_sample=name == "DDIM")
    return _make_solver(name, {**base.config, "timestep_spacing": "trailing"})


def _make_flow(base: Any, name: str, shift: float) -> Any:
    if name in ("Euler", "Heun"):
        kind = "FlowMatchEulerDiscreteScheduler" if name == "Euler" else _HEUN
        return getattr(diffusers, kind).from_config(base.config, shift=shift)
    config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    return _make_solver(name, config)


_HEUN = "FlowMatchHeunDiscreteScheduler"


def _make_solver(name: str, config: Mapping[str, Any]) -> Any:
    if name.startswith("DPM"):
        order = int(name[-2])
        return diffusers.DPMSolverMultistepScheduler.from_config(
            dict(config), algorithm_type="dpmsolver++", solver_order=order
        )
    kinds = {"UniPC": "UniPCMultistepScheduler", "DEIS": "DEISMultistepScheduler"}
    if name not in kinds:
        raise ValueError(f"sampler: expected one of {', '.join(SOLVERS)}, found {name!r}")
    return getattr(diffusers, kinds[name]).from_config(dict(config))
