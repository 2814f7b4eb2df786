"""Requests plans that make themselves: :func:`auto`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pabc.automatic.courses import PipelineCourses
from pabc.automatic.follower import Follower
from pabc.automatic.planner import Planner
from pabc.automatic.store import Store, default_folder
from pabc.calibration.target import Target, as_count, as_floor
from pabc.compiled import CompiledModel
from pabc.planning import SelfPlanning


@dataclass(frozen=True)
class Auto(SelfPlanning):
    """A request for plans, to be given in the place of a schedule. Made by :func:`auto`.

    Attributes:
        target: the speedup, fidelity or number of calls that is asked for.
        floor: the PSNR in dB below which no plan is taken.
        candidates: the most plans that are run to choose from.
        folder: where recordings are kept for other processes; None: nowhere.
    """

    target: Target
    floor: float
    candidates: int
    folder: Path | None

    def attach(self, model: CompiledModel) -> None:
        """Plans the generations of a model from now on. Raises ValueError for a sharded model."""
        model.follow(Follower(model, self._planner({"": model})))

    def plans_for(self, models: Mapping[str, CompiledModel]) -> PipelineCourses:
        """Returns what plans the generations of a pipeline with these models."""
        return PipelineCourses(self._planner(models))

    def _planner(self, models: Mapping[str, CompiledModel]) -> Planner:
        for name, model in models.items():
            if model.is_sharded:
                raise ValueError(
                    f"{name or 'model'}: expected one process with pabc.auto, found a mesh: the "
                    "processes would measure other seconds, and choose other plans; calibrate "
                    "with pabc.calibrate in one, and give all of them its schedule"
                )
            model.expect_skips()
        store = None if self.folder is None else Store(self.folder)
        return Planner(self.target, self.floor, self.candidates, models, store)

    def __str__(self) -> str:
        return f"auto({self.target})"


def auto(
    speedup: float | None = None,
    *,
    psnr: float | None = None,
    calls: int | None = None,
    floor: float = 40.0,
    candidates: int = 4,
    cache: bool | str | os.PathLike[str] = True,
) -> Auto:
    """Returns a request for plans that make themselves, for :func:`pabc.compile` and
    :func:`pabc.compile_pipeline` to take in the place of a schedule.

        fast = pabc.compile_pipeline(pipe, pabc.auto(speedup=2.0))
        fast(prompt)  # runs in full, and is recorded
        fast(another)  # follows the plan, as do all generations after it

    The first generation of a kind (model, timesteps, guidance, shapes) computes all steps and is
    recorded. Then plans for the target are searched, a few of them are run on its noise, and the
    one that comes closest to what was recorded is taken. The recording goes to a folder, so that
    another process starts with the plan.

    Args:
        speedup: how many times faster the model's calls of a generation are to be, as full and
            skipped calls are measured on this device; 2 if no other target is given.
        psnr: the least PSNR of the final latents to those of the full generation, in dB, that the
            fastest plan is to have; their peak is the range of their values.
        calls: how many steps of a generation may call the model.
        floor: the PSNR in dB that a plan for `speedup` or `calls` must have. Where none has, a
            warning says so, and the fastest plan that has it is taken.
        candidates: the most plans that are run for one number of computed steps.
        cache: the folder of recordings; True: that in the environment variable PABC_CACHE, or
            `pabc` in the user's folder for caches; False: none is kept.

    Raises ValueError for more than one target, or one that cannot be.
    """
    if speedup is None and psnr is None and calls is None:
        speedup = 2.0
    target = Target.of(speedup=speedup, psnr=psnr, calls=calls)
    if not isinstance(cache, bool | str | os.PathLike):
        raise ValueError(f"cache: expected a folder, True or False, found {cache!r}")
    folder = default_folder() if cache is True else None if cache is False else Path(cache)
    return Auto(target, as_floor(floor), as_count(candidates), folder)
