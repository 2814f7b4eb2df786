"""Sets up what pabc calibrates: `pabc.calibrate` and `pabc.auto` on the clips that methods see."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

from case import Ready
from pareto_methods import Choice, Method
from pareto_plans import format_steps, run_schedule
from pareto_setups import Clips, Loop, Setup, Subject

import pabc

NUM_CANDIDATES = 6
"""Plans that are run on the seen clips, of which the best is taken."""


def calibrate(
    subject: Subject, setup: Setup, computed: int, clips: Clips, candidates: int = NUM_CANDIDATES
) -> Any:
    """Returns the calibration of a setup for a number of calls, on one generation of clips.

    What was recorded and measured is kept, so that other numbers of calls go on from there.
    """
    key = repr((subject.digest, setup, clips.prompts, float(clips.noise.double().sum())))
    name = hashlib.sha256(key.encode()).hexdigest()[:24]
    subject.store.folder.mkdir(parents=True, exist_ok=True)
    loop = subject.loop(setup, clips)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pabc.calibrate(
            lambda model, seed: loop.run(model),
            subject.model.transformer,
            calls=computed,
            seeds=(0,),
            candidates=candidates,
            floor=0.0,
            progress=False,
            resume=subject.store.folder / f"{name}.npz",
        )


def choose_calibrated(
    subject: Subject, setup: Setup, computed: int, seed: int = 0, candidates: int = NUM_CANDIDATES
) -> Choice:
    """Returns the plan of `pabc.calibrate`; its facts are what it predicted and measured."""
    clips = subject.draw_seen(seed) if seed else subject.seen
    found = calibrate(subject, setup, computed, clips, candidates)
    row = next(row for row in found.frontier() if row.computed == computed)
    schedule = found.schedule(calls=computed)
    timesteps = [step for step, reuses in enumerate(schedule.mask("model")) if not reuses]
    peak = found.recording.peak
    return run_schedule(
        schedule,
        f"{row.name}, computes {format_steps(timesteps)}",
        predicted=round(row.candidate.decibels(peak), 3),
        seen_psnr=round(row.measured, 3),
    )


def choose_auto(subject: Subject, setup: Setup, computed: int) -> Choice:
    """Returns `pabc.auto`, whose first generations are those of the seen clips.

    The first is recorded, and before the second, plans are run to choose from: neither is judged.
    """

    def prepare(loop: Loop) -> Ready:
        request = pabc.auto(calls=computed, floor=0.0, cache=False)
        fast = pabc.compile(loop.model.transformer, request, backend="original")
        for _ in range(2):
            subject.loop(setup, subject.seen).run(fast)
        return Ready(fast, on_end=fast.reset)

    return Choice(f"calls={computed}", prepare)


def choose_other_seed(seed: int) -> Any:
    """Returns `choose_calibrated` with other prompts and noise."""

    def choose(subject: Subject, setup: Setup, computed: int) -> Choice:
        return choose_calibrated(subject, setup, computed, seed)

    return choose


CALIBRATED = Method(
    "pabc calibrated", "pabc.calibrate, one generation of the seen clips", choose_calibrated, False
)
OTHER_SEEDS = tuple(
    Method(
        f"pabc calibrated (seed {seed})",
        "the same with other calibration clips",
        choose_other_seed(seed),
        False,
    )
    for seed in (1, 2)
)
AUTO = Method("pabc auto", "pabc.auto, after a generation of the seen clips", choose_auto, False)
