"""Times a few points of `pareto.py`: compiled, in turns, over torch.compile of the full run.

Every variant has a copy of the model. It generates once to compile, and then once in each round, in
an order that rotates. Seconds are those of whole generations, sampler included; a speedup is the
median over rounds of the seconds of torch.compile's full run over the variant's in the same round.
Peers run as their documentation says, eager and under torch.compile, with the settings that they
have in the fidelity part.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import report
import torch
from case import Ready
from pareto_calibrated import choose_calibrated
from pareto_methods import METHOD_ERRORS, Choice
from pareto_points import METHODS, SPEEDS, THOROUGH
from pareto_quality import compare
from pareto_setups import Loop, Setup, Subject
from torch import Tensor

import pabc

BASE = "torch.compile"
PEERS = ("TaylorSeer", "MagCache", "FirstBlockCache", "PAB", "FasterCache", "cache-dit")
NUM_RECOMPILES = 256
"""The limit of Dynamo during the comparison: all variants share the code of a model, and a peer's
hooks are recompiled many times. At its default of 8, some would silently run eagerly."""
Backend = Literal["inductor", "eager"]
Row = dict[str, Any]


@dataclass
class Variant:
    """A way to generate, and the seconds that it took."""

    name: str
    loop: Loop
    prepare: Callable[[Loop], Ready]
    computed: int | None = None
    setting: str = ""
    ready: Ready = field(init=False)
    seconds: list[float] = field(default_factory=list)

    def generate(self) -> tuple[Tensor, float]:
        """Returns the samples of one generation, and its seconds."""
        begin = time.perf_counter()
        with torch.no_grad():
            samples = self.loop.run(self.ready.call, self.ready.on_step)  # type: ignore[arg-type]
        seconds = time.perf_counter() - begin
        self.ready.on_end()
        return samples, seconds


def list_variants(
    subject: Subject, setup: Setup, speeds: Sequence[float], backend: Backend
) -> Iterator[Variant]:
    """Yields the variants of a setup; peers that reach no such speed are left out."""
    compile_full, compile_plan = _compile_full(backend), partial(_compile_plan, backend)
    loop = subject.loop(setup, subject.judged)
    counts = [max(2, round(loop.num_calls / speed)) for speed in speeds]
    yield Variant("eager", loop, lambda loop: Ready(loop.model.transformer), loop.num_calls)
    yield Variant(BASE, loop, compile_full, loop.num_calls)
    for count in counts:
        fewer = Setup(setup.model, setup.sampler, count, setup.guidance, setup.shift)
        name = f"{BASE}, {setup.sampler} {count}"
        yield Variant(name, subject.loop(fewer, subject.judged), compile_full, count)
    none = pabc.Schedule.none(loop.sampler.timesteps)
    yield Variant("pabc, no reuse", loop, compile_plan(none), loop.num_calls)
    for count in counts:
        timesteps = loop.sampler.timesteps
        rule = pabc.Schedule.skip(timesteps, count)
        yield Variant(f"pabc skip {count}", loop, compile_plan(rule), count, rule.label)
        choice = choose_calibrated(subject, setup, count)
        assert choice.schedule is not None
        name = f"pabc calibrated {count}"
        yield Variant(name, loop, compile_plan(choice.schedule), count, choice.setting)
    for count in counts:
        yield from list_peers(subject, setup, loop, count, backend)


def list_peers(
    subject: Subject, setup: Setup, loop: Loop, count: int, backend: Backend
) -> Iterator[Variant]:
    """Yields the peers that reach a number of calls, eager and compiled."""
    for peer in PEERS:
        try:
            choice: Choice = METHODS[peer].choose(subject, setup, count)
        except METHOD_ERRORS:
            continue
        yield Variant(f"{peer} {count}", loop, choice.prepare, None, choice.setting)
        compiled = _compile_ready(choice.prepare, backend)
        yield Variant(f"{peer} {count}, compiled", loop, compiled, None, choice.setting)


def _compile_full(backend: Backend) -> Callable[[Loop], Ready]:
    """Returns what compiles a copy of the model by torch.compile."""

    def prepare(loop: Loop) -> Ready:
        model = copy.deepcopy(loop.model.transformer)
        return Ready(torch.compile(model, fullgraph=True, backend=backend))

    return prepare


def _compile_plan(backend: Backend, schedule: pabc.Schedule) -> Callable[[Loop], Ready]:
    """Returns what compiles a copy of the model by pabc, with a schedule."""

    def prepare(loop: Loop) -> Ready:
        fast = pabc.compile(copy.deepcopy(loop.model.transformer), schedule, backend=backend)
        return Ready(fast, on_end=fast.reset)

    return prepare


def _compile_ready(prepare: Callable[[Loop], Ready], backend: Backend) -> Callable[[Loop], Ready]:
    """Returns what compiles a peer's model after its cache is enabled."""

    def prepare_compiled(loop: Loop) -> Ready:
        ready = prepare(loop)
        ready.call = torch.compile(ready.call, backend=backend)
        return ready

    return prepare_compiled


def measure_seconds(
    subject: Subject,
    rounds: int,
    show: Callable[[str], None],
    *,
    speeds: Sequence[float] = SPEEDS,
    backend: Backend = "inductor",
) -> dict[str, Row]:
    """Returns the rows of a model: name -> seconds, speedup and quality."""
    with torch._dynamo.config.patch(
        recompile_limit=NUM_RECOMPILES, accumulated_recompile_limit=4 * NUM_RECOMPILES
    ):
        return _measure(subject, rounds, show, speeds, backend)


def _measure(
    subject: Subject,
    rounds: int,
    show: Callable[[str], None],
    speeds: Sequence[float],
    backend: Backend,
) -> dict[str, Row]:
    """Returns the rows; the configuration of Dynamo is as it is."""
    setup = THOROUGH[subject.model.name][0]
    setup = setup if backend == "inductor" else replace(setup, calls=6)
    found: dict[str, Row] = {}
    ready: list[Variant] = []
    for variant in list_variants(subject, setup, speeds, backend):
        try:
            begin = time.perf_counter()
            variant.ready = variant.prepare(variant.loop)
            samples, _ = variant.generate()
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            found[variant.name] = {"error": f"{type(error).__name__}: {lines[0]}"[:200]}
            show(f"{variant.name}: {found[variant.name]['error']}")
            continue
        ready.append(variant)
        found[variant.name] = {
            "setting": variant.setting,
            "computed": variant.computed,
            "first_seconds": round(time.perf_counter() - begin, 2),
            **compare(samples, subject.full(setup)),
        }
        show(f"{variant.name}: first generation, {found[variant.name]['first_seconds']} s")
    race(ready, rounds)
    base = next(variant.seconds for variant in ready if variant.name == BASE)
    for variant in ready:
        ratios = [b / s for b, s in zip(base, variant.seconds, strict=True)]
        found[variant.name] |= {
            "seconds": report.summarize(variant.seconds),
            "over_torch_compile": round(statistics.median(ratios), 4),
        }
    return found


def race(variants: Sequence[Variant], rounds: int) -> None:
    """Lets all variants generate once a round, in an order that rotates."""
    for index in range(rounds):
        shift = index % len(variants)
        for variant in (*variants[shift:], *variants[:shift]):
            variant.seconds.append(variant.generate()[1])


def format_seconds(found: dict[str, Row]) -> str:
    """Returns the table of one model."""
    rows = [
        [
            name,
            report.format_spread(row["seconds"]),
            f"{row['over_torch_compile']:.2f}x",
            f"{row['psnr']:.1f} ({row['psnr_min']:.1f})",
            row["setting"],
        ]
        for name, row in found.items()
        if "seconds" in row
    ]
    header = ("variant", "s / generation", "over torch.compile", "PSNR (worst)", "setting")
    failed = [f"{name}: {row['error']}" for name, row in found.items() if "error" in row]
    return "\n".join([report.format_table(header, rows), *failed])
