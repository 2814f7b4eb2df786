"""Switches off each ingredient of pabc's calibration in turn, and measures what is lost.

    python bench/ablations.py --out bench/results/ablations.json --resume

Setups are those that `pareto.py` compares most closely, clips are its own: one that is recorded
and on which plans are chosen, others that are judged. A row is a way to find a plan for a number of
computed calls; its figure is the PSNR to the full run, mean and worst clip.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pareto_points
import report
import rows
import torch
from ablation_regions import Greedy, RegionPlan
from pareto_methods import run_choice
from pareto_plans import format_steps, run_schedule
from pareto_quality import compare, mean_psnr
from pareto_setups import Clips, Recorded, Setup, Subject, load_subject
from torch import Tensor

import pabc
from pabc.calibration.candidates import COMPENSATION, KINDS, Candidate, Kind
from pabc.calibration.fit import fit_weights
from pabc.calibration.measurement import FLATTERY
from pabc.calibration.recording import Recorder, Recording
from pabc.calibration.search import search
from pabc.calibration.updates import identify

LIMIT = 6
"""Plans that are run to choose from."""
PERTURBATION = 0.02
"""The share of noise that tells how much of an error is left at the end."""


@dataclass(frozen=True)
class Trial:
    """Finds plans from one clip, or from several."""

    subject: Subject
    setup: Setup

    def record(self, clips: Clips) -> Recorded:
        """Returns the full run of clips."""
        key = ("recorded", clips.prompts, float(clips.noise.double().sum()))
        loop = self.subject.loop(self.setup, clips)
        return Recorded(*self.subject.keep(self.setup, key, lambda: tuple(loop.record())))

    def recording(self, clips: Clips) -> Recording:
        """Returns the recording of clips, as one generation."""
        recorded = self.record(clips)
        recorder = Recorder()
        for step, (x, output) in enumerate(zip(recorded.inputs, recorded.outputs, strict=True)):
            recorder.add_input(step, x)
            for branch, part in enumerate(output.chunk(2)):
                recorder.add_output(str(branch), step, part)
        timesteps = self.subject.loop(self.setup, clips).sampler.timesteps
        return recorder.finish(timesteps, recorded.samples)

    def growth(self) -> np.ndarray:
        """Returns how much of a change at each step is left at the end, [n]."""
        clips = self.subject.seen
        generator = torch.Generator().manual_seed(0)
        change = torch.randn(clips.noise.shape, generator=generator)
        changed = Clips(clips.prompts, clips.noise + PERTURBATION * change)
        loop = self.subject.loop(self.setup, changed)
        found = self.subject.keep(self.setup, "perturbed", lambda: tuple(loop.record()))
        other, own = Recorded(*found), self.record(clips)
        pairs = zip([*other.inputs, other.samples], [*own.inputs, own.samples], strict=True)
        sizes = [float((a - b).norm()) for a, b in pairs]
        return np.array([sizes[-1] / max(size, 1e-9) for size in sizes[1:]])

    def run(self, plan: Candidate | RegionPlan, clips: Clips) -> tuple[Tensor, float]:
        """Returns the samples of a plan, and the operations that it takes, in calls."""
        loop = self.subject.loop(self.setup, clips)
        timesteps = loop.sampler.timesteps
        is_whole = isinstance(plan, Candidate)
        choice = run_schedule(plan.schedule(timesteps), "") if is_whole else plan.choose(timesteps)
        samples, share = run_choice(loop, choice)
        return samples, share * loop.num_calls

    def measure(self, candidate: Candidate) -> float:
        """Returns the PSNR of a plan on the seen clips."""
        samples, _ = self.run(candidate, self.subject.seen)
        return mean_psnr(samples, self.record(self.subject.seen).samples)


Find = Callable[[Trial, int], Candidate | RegionPlan]
"""(trial, number of computed calls) -> plan of as many operations."""
FindWhole = Callable[[Trial, int], Candidate]
"""The same, of whole calls."""


def find_best(
    kinds: Sequence[Kind] = KINDS,
    *,
    limit: int = LIMIT,
    num_clips: int = 1,
    grows: bool = False,
    is_wary: bool = True,
) -> FindWhole:
    """Returns a way that runs the plans of some kinds on the seen clips, and takes the best.

    `is_wary`: whether plans without fitted weights are preferred, as pabc does.
    """

    def find(trial: Trial, computed: int) -> Candidate:
        seen = trial.subject.seen if num_clips == 1 else None
        recordings = [
            trial.recording(seen if seen else trial.subject.draw_seen(seed))
            for seed in range(num_clips)
        ]
        recording = sum(recordings[1:], start=recordings[0])
        growth = trial.growth() if grows else None
        found = search(recording, identify(recording), kinds=kinds, growth=growth)
        plans = found.candidates(computed, limit=limit)
        if len(plans) == 1:
            return plans[0]
        handicap = FLATTERY if is_wary else 0.0
        return max(plans, key=lambda plan: trial.measure(plan) + handicap * plan.is_held)

    return find


def find_predicted(trial: Trial, computed: int) -> Candidate:
    """Returns the plan with the least predicted error, of all kinds, without a run."""
    recording = trial.recording(trial.subject.seen)
    plans = search(recording, identify(recording)).candidates(computed, limit=LIMIT)
    return min(plans, key=lambda plan: plan.error)


def find_with_weights(order: int) -> Find:
    """Returns a way that takes searched steps, and the polynomial of an order for weights."""

    def find(trial: Trial, computed: int) -> Candidate:
        found = find_best([Kind("3 weights")])(trial, computed)
        n = len(found.weights)
        weights = []
        for step in range(n):
            sources = [i for i in found.computed if i < step][::-1][: order + 1]
            weights.append(() if step in found.computed else _extrapolate(step, sources))
        return replace(found, name=f"order {order}", weights=tuple(weights))

    return find


def _extrapolate(step: int, sources: Sequence[int]) -> tuple[float, ...]:
    """Returns the weights of the polynomial through the sources, at a step."""
    return tuple(
        float(np.prod([(step - other) / (source - other) for other in sources if other != source]))
        for source in sources
    )


def find_with_regions(calls: int) -> Find:
    """Returns a way that computes some calls more than allowed, and reuses regions within them
    until as many operations are saved."""

    def find(trial: Trial, computed: int) -> RegionPlan:
        seen = trial.subject.seen
        base = find_best()(trial, computed + calls)
        loop = trial.subject.loop(trial.setup, seen)
        updates = identify(trial.recording(seen))
        return Greedy(loop, trial.record(seen), updates, base).choose(calls)

    return find


def find_with_steps(trial: Trial, computed: int) -> Candidate:
    """Returns the steps of `Schedule.skip`, with three fitted weights."""
    recording = trial.recording(trial.subject.seen)
    mask = pabc.Schedule.skip(recording.timesteps, computed).mask("model")
    steps = tuple(step for step, reuses in enumerate(mask) if not reuses)
    gram = identify(recording).guided(recording)
    weights: list[tuple[float, ...]] = []
    for step, reuses in enumerate(mask):
        sources = [i for i in steps if i < step][::-1][:3]
        padded = np.array([*sources, *[-1] * (3 - len(sources))])
        found, _ = fit_weights(gram, np.array(step), padded)
        weights.append(tuple(map(float, found[: len(sources)])) if reuses else ())
    return Candidate("steps by rule", steps, tuple(weights), 1.0)


def _change(**changes: Any) -> list[Kind]:
    """Returns all kinds with something changed."""
    return [replace(kind, **changes) for kind in KINDS]


def list_ways() -> dict[str, Find]:
    """Returns the ways to find a plan by name, the whole calibration first."""
    ways: dict[str, Find] = {
        "all": find_best(),
        "no real run: the first kind": find_best(limit=1),
        "no real run: least predicted error": find_predicted,
        "fitted weights as good as held outputs": find_best(is_wary=False),
        "kinds: errors guided alone": find_best([kind for kind in KINDS if kind.is_guided]),
        "compensation: none": find_best(_change(compensation=0.0)),
        "compensation: of all errors, not half": find_best(_change(compensation=1.0)),
        "growth of errors: none expected": find_best(_change(growth="none")),
        "growth of errors: a decay as it is, not its square": find_best(_change(power=1.0)),
        "growth of errors: measured": find_best(grows=True),
        "costs of all steps alike": find_best(_change(cost="flat", growth="none")),
        "branches alike, not guided": find_best(_change(is_guided=False)),
        "recorded four clips": find_best(num_clips=4),
        "steps by rule, three fitted weights": find_with_steps,
        "searched steps, line": find_with_weights(1),
        "searched steps, parabola": find_with_weights(2),
    }
    for calls in (1, 3):
        ways[f"regions worth {calls} more computed calls"] = find_with_regions(calls)
    for sources in (1, 2, 3, 4, 6):
        for name, compensation in (("plain", 0.0), ("compensated", COMPENSATION)):
            kind = Kind(f"{sources}", sources=sources, compensation=compensation)
            ways[f"one kind: {sources} weights, {name}"] = find_best([kind])
    return ways


def main() -> None:
    """Measures all ways on the models that the options name; prints a table, writes JSON."""
    options = parse_options()
    torch.set_num_threads(1)
    settings = {"smoke": options.smoke, "judged": options.judged}
    found = rows.Rows(
        options.out, report.describe_run(), settings, options.resume, is_same_commit=False
    )
    for name in options.models:
        subject = load_subject(
            name, options.judged, 1, options.store, 12, is_trained=not options.smoke
        )
        setup = pareto_points.THOROUGH[name][0]
        setup = replace(setup, calls=6) if options.smoke else setup
        for speed in options.speeds:
            for way, find in list_ways().items():
                if options.ways and way not in options.ways:
                    continue
                key = f"{setup} | {way} | {round(setup.calls / speed)}"
                if key not in found:
                    found.add(key, measure(subject, setup, way, find, speed))
                    print(f"{key}: {found.rows[key]}", file=sys.stderr, flush=True)
    print(format_rows(found.rows))


def parse_options() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rows.add_options(parser)
    add = parser.add_argument
    add("--models", type=lambda text: text.split(","), default=["digits", "emoji"])
    add("--speeds", type=lambda text: [float(x) for x in text.split(",")], default=[1.5, 2.0, 3.0])
    add("--ways", nargs="*", metavar="WAY", help="only these, by name")
    add("--judged", type=lambda text: [int(x) for x in text.split(",")], default=[2, 3])
    add("--store", type=Path, default=Path(tempfile.gettempdir()) / "pabc-pareto")
    options = parser.parse_args()
    if options.smoke:
        options.judged, options.speeds = [1, 2], [2.0]
    return options


def measure(subject: Subject, setup: Setup, way: str, find: Find, speed: float) -> dict[str, Any]:
    """Returns the row of one way; one with `error` where it finds no plan."""
    trial, computed = Trial(subject, setup), round(setup.calls / speed)
    facts = {"setup": str(setup), "way": way, "computed": computed}
    facts["commit"] = report.read_commit()
    try:
        plan = find(trial, computed)
        samples, operations = trial.run(plan, subject.judged)
    except Exception as error:
        return {**facts, "error": f"{type(error).__name__}: {error}"[:200]}
    steps = format_steps(plan.computed)
    facts |= {"plan": f"{plan.name}: {steps}", "operations": round(operations, 3)}
    if isinstance(plan, RegionPlan):
        without, _ = trial.run(plan.base, subject.judged)
        facts["psnr_without_regions"] = compare(without, subject.full(setup))["psnr"]
        facts["reuses"] = [f"{step} {region.name} {rule}" for step, region, rule in plan.reuses]
    return {**facts, **compare(samples, subject.full(setup))}


def format_rows(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a table per setup: a line per way, a column per number of computed calls."""
    return "\n".join(
        f"\n{setup}: PSNR in dB to the full run, mean (worst)\n{report.format_table(header, lines)}"
        for setup, header, lines in list_tables(found)
    )


def list_tables(
    found: Mapping[str, Mapping[str, Any]],
) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yields the name, the header and the lines of each setup's table."""
    for setup in dict.fromkeys(row["setup"] for row in found.values()):
        own = [row for row in found.values() if row["setup"] == setup]
        counts = sorted({row["computed"] for row in own}, reverse=True)
        cells = {(row["way"], row["computed"]): row for row in own}
        lines = []
        for way in dict.fromkeys(row["way"] for row in own):
            line = [cells.get((way, count), {}) for count in counts]
            shown = [f"{r['psnr']:.1f} ({r['psnr_min']:.1f})" if "psnr" in r else "" for r in line]
            lines.append([way, *shown])
        yield setup, ["way", *(f"{count} calls" for count in counts)], lines


if __name__ == "__main__":
    main()
