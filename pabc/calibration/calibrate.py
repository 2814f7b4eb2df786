"""Calibrates a model: records generations, searches for plans, runs some, and takes the best."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from pabc.calibration.calibration import Calibration
from pabc.calibration.choice import Choice
from pabc.calibration.notes import Notes, fingerprint
from pabc.calibration.progress import Progress
from pabc.calibration.sampled_runs import SampledRuns
from pabc.calibration.subject import Sample, Subject
from pabc.calibration.target import Target, as_count, as_floor, as_seeds

Numbers = float | Iterable[float] | None
"""A target, or several."""


def calibrate(
    sample: Sample,
    model: Any,
    *,
    speedup: Numbers = None,
    psnr: Numbers = None,
    calls: Numbers = None,
    seeds: Iterable[int] = (0,),
    candidates: int = 6,
    floor: float = 40.0,
    components: Iterable[str] | None = None,
    progress: bool = True,
    resume: str | os.PathLike[str] | None = None,
) -> Calibration:
    """Finds which calls of a diffusion model to run, and how to forecast the others.

    One generation or more are recorded in full. From these follow, for every number of computed
    steps, plans of several kinds. The most promising ones are run, with the model as it is (nothing
    is captured or compiled), and the one that comes closest to the full result is taken.

        def sample(pipe, seed):
            generator = torch.Generator().manual_seed(seed)
            return pipe("a red car", generator=generator, output_type="latent").images

        calibration = pabc.calibrate(sample, pipe, speedup=2.0)
        fast = pabc.compile_pipeline(pipe, calibration.schedule())

    Args:
        sample: `sample(model, seed)` runs one full generation with the model or pipeline that it is
            given, and returns the result: a tensor, an array, pictures, or anything that holds
            these, such as a pipeline's output. The same seed gives the same result.
        model: a transformer, in eval mode, or a diffusers pipeline. A transformer that is called
            several times a step is told which call is which by `model.cache_context(name)`.
        speedup: how many times faster the calls of a generation should be, or several numbers, each
            of which is measured; by the seconds that full and skipped calls take here.
        psnr: the least PSNR to the full result, in dB, of the fastest plan; the peak is the range
            of the full result.
        calls: how many steps call the model (each of its guidance branches).
        seeds: those that are recorded and measured. More of them make the fit less particular to
            one: see `pabc/calibration/README.md` for how much.
        candidates: the most plans that are run for one number of computed steps.
        floor: the PSNR in dB below which no plan is taken for a `speedup` or `calls`; the fastest
            one above it is, with a warning.
        components: of a pipeline, as in :func:`pabc.compile_pipeline`.
        progress: shows generations as they are done, on stderr.
        resume: a file for what was recorded and measured so far, written after each generation. If
            it exists, what it holds is not run again, but for the first three steps of one recorded
            generation: other prompts, noise, shapes, precision, guidance, samplers or timesteps
            are refused. What shows only later cannot be known without a run, and is taken to be as
            it was: a `sample` that goes on otherwise, or makes something else of the same latents.

    Returns:
        The plans, of which `schedule()` gives the one for the first target.

    Raises:
        TypeError: no module or pipeline; `sample` returns nothing that can be compared.
        ValueError: a bad argument; `sample` does not call the model, or not with the same inputs
            for the same seed; a file for `resume` that is of another model, or another `sample`.
    """
    targets = Target.all_of(speedup=speedup, psnr=psnr, calls=calls)
    chosen, limit, least = as_seeds(seeds), as_count(candidates), as_floor(floor)
    notes = Notes.open("" if resume is None else fingerprint(model), resume)
    with Subject(model, components=components) as subject, Progress(progress) as shown:
        runs = SampledRuns(sample, subject, notes, shown, chosen)
        choice = Choice(runs.record(), runs, limit=limit, floor=least)
        plans = tuple((target, choice.meet(target)) for target in targets)
    costs = notes.costs
    measured = tuple(each for each in notes.measured.values())
    return Calibration(
        notes.recording(chosen), measured, costs.full, costs.skipped, plans, least, chosen
    )
