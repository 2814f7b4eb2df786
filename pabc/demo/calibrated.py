"""Calibrates a model of the demo, as users do, on captions and noise that are not judged."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch

import pabc
from pabc.calibration.candidates import Candidate
from pabc.calibration.frontier import Corrections
from pabc.demo.model import Model
from pabc.schedule import Schedule

TARGETS = (1.5, 2, 3)
"""How many times fewer calls the plans make."""
HEADLINE = "calibrated 2x"
NUM_CAPTIONS = 4
"""The captions of the generation that is recorded, as one batch."""
NUM_CANDIDATES = 4
"""The plans that are run for each target."""
SEEDS_APART = 1_000_000
"""The distance of the seeds of captions and noise from those of the judged ones."""


@dataclass(frozen=True)
class Calibrated:
    """A calibration, and what it took.

    Attributes:
        calls: variant -> the number of computed steps.
        captions: those of the recorded generation.
        seconds: wall time of `pabc.calibrate`.
        warnings: what it warned of.
    """

    calibration: pabc.Calibration
    calls: dict[str, int]
    captions: tuple[str, ...]
    seconds: float
    warnings: tuple[str, ...] = ()

    def plan(self, name: str) -> Candidate:
        """Returns the plan of a variant."""
        return self.calibration.plan(calls=self.calls[name])

    def schedule(self, name: str) -> Schedule:
        """Returns the schedule of a variant."""
        return self.calibration.schedule(calls=self.calls[name])


def count_calls(steps: int) -> dict[str, int]:
    """Returns variant -> how many of the steps it computes: shares of all, rounded up.

    A plan computes the first and the last step, and leaves out one or more; there are no two of
    the same number.
    """
    found: dict[str, int] = {}
    for target in TARGETS:
        calls = math.ceil(steps / target)
        if 2 <= calls < steps and calls not in found.values():
            found[f"calibrated {target:g}x"] = calls
    return found


def calibrate(model: Model, *, steps: int, judged: Collection[str], seed: int) -> Calibrated | None:
    """Records a generation, and runs some plans; returns None for too few steps.

    Args:
        model: the model.
        steps: those of a generation.
        judged: the captions that variants are judged by, none of which is recorded.
        seed: that of the demo.
    """
    calls = count_calls(steps)
    if not calls:
        return None
    own = seed + SEEDS_APART
    captions = _pick_captions(model, own, judged)

    def sample(transformer: Any, seed: int) -> torch.Tensor:
        noise = model.noise(seed, len(captions))
        return model.generate(transformer, list(captions), noise, num_steps=steps)

    start = perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        found = pabc.calibrate(
            sample,
            model.transformer,
            calls=tuple(calls.values()),
            seeds=(own,),
            candidates=NUM_CANDIDATES,
            floor=-math.inf,  # the table shows what a plan gives, however little that is
        )
    noted = tuple(str(each.message) for each in caught if issubclass(each.category, UserWarning))
    return Calibrated(found, calls, captions, perf_counter() - start, noted)


def _pick_captions(model: Model, seed: int, judged: Collection[str]) -> tuple[str, ...]:
    drawn = model.prompts(seed, NUM_CAPTIONS + len(judged))
    others = [caption for caption in dict.fromkeys(drawn) if caption not in judged]
    return tuple(others or drawn)[:NUM_CAPTIONS]


def describe(found: Calibrated, table: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what `metrics.json` holds of a calibration; a figure without a finite value is None.

    Args:
        found: the calibration.
        table: the figures of all variants, see `metrics.measure`.
    """
    runs = _list_runs(found.calibration)
    return {
        "captions": list(found.captions),
        "seconds": found.seconds,
        "seconds_full": found.calibration.seconds_full,
        "seconds_skipped": found.calibration.seconds_skipped,
        "frontier": _list_frontier(found.calibration),
        "plans": {
            name: {
                "plan": found.plan(name).name,
                "computed": list(found.plan(name).computed),
                "judged": table[name]["psnr"],
                "judged_worst": table[name]["psnr_min"],
            }
            for name in found.calls
        },
        "runs": runs,
        **compare([(run["predicted"], run["measured"]) for run in runs]),
    }


def _list_frontier(calibration: pabc.Calibration) -> list[dict[str, Any]]:
    """Returns the rows of plans that skip calls."""
    return [
        {
            "computed": row.computed,
            "speedup": row.speedup,
            "predicted": _finite(row.predicted),
            "measured": _finite(row.measured),
            "plan": row.name,
        }
        for row in calibration.frontier()
        if row.computed < calibration.num_steps
    ]


def _list_runs(calibration: pabc.Calibration) -> list[dict[str, Any]]:
    """Returns the plans that were run on the recorded noise.

    A prediction is corrected by the other plans of its kind, as those of the frontier are.
    """
    rows = []
    for each in calibration.measured:
        others = [other for other in calibration.measured if other is not each]
        rows.append(
            {
                "plan": each.candidate.name,
                "computed": each.num_computed,
                "uncorrected": _finite(each.predicted),
                "predicted": _finite(Corrections(others).correct(each.candidate, each.predicted)),
                "measured": _finite(each.mean),
            }
        )
    return sorted(rows, key=lambda row: (row["computed"], row["plan"]))


def compare(pairs: Sequence[tuple[float | None, float | None]]) -> dict[str, float | None]:
    """Returns the correlation of predicted and measured dB, and the largest difference in dB.

    Each is None where there are too few pairs.
    """
    known = np.array([pair for pair in pairs if None not in pair], dtype=np.float64)
    if not len(known):
        return {"correlation": None, "largest_miss": None}
    predicted, measured = known.T
    miss = float(np.abs(predicted - measured).max())
    is_flat = len(known) < 3 or predicted.std() == 0 or measured.std() == 0
    correlation = None if is_flat else float(np.corrcoef(predicted, measured)[0, 1])
    return {"correlation": correlation, "largest_miss": miss}


def say_misses(content: Mapping[str, Any]) -> str:
    """Returns a sentence on predicted and measured dB, from an entry of `describe`."""
    correlation, miss = content["correlation"], content["largest_miss"]
    found = [] if correlation is None else [f"correlation {correlation:.2f}"]
    found += [] if miss is None else [f"largest miss {miss:.1f} dB"]
    return (
        f"Predicted against measured PSNR of the {len(content['runs'])} plans that were run:"
        f" {', '.join(found) or 'none to compare'}."
    )


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
