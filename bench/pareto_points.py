"""Lists the points that each part of `pareto.py` measures."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pareto_calibrated import AUTO, CALIBRATED, OTHER_SEEDS
from pareto_methods import Method
from pareto_peers import PEERS
from pareto_plans import OWN, REFERENCES
from pareto_samplers import is_flow, name_samplers
from pareto_setups import Setup, Subject

METHODS = {
    method.name: method for method in (CALIBRATED, *OWN, *PEERS, *REFERENCES, AUTO, *OTHER_SEEDS)
}
FULL = "full"
FEWER = "fewer steps"
SPEEDS = (1.5, 2.0, 3.0)
MORE_SPEEDS = (1.25, 2.5, 2.8, 4.0)
"""Further ones of the setup that is compared most closely."""
CALLS = (50, 28, 20, 10)
THOROUGH = {
    "digits": (Setup("digits", "DDIM", 50), Setup("digits", "DDIM", 25)),
    "emoji": (Setup("emoji", "Euler", 28), Setup("emoji", "Euler", 50)),
}
"""Setups at which all methods are measured; the first of each at all speeds."""
OTHERS = {
    "digits": ("DPM-Solver++ 2M", "UniPC"),
    "emoji": ("Heun", "DPM-Solver++ 2M", "UniPC"),
}
"""Samplers besides the model's own."""
PEER_SETUPS = (Setup("digits", "UniPC", 28), Setup("emoji", "UniPC", 28))
"""Setups with another sampler at which peers run."""
GRIDS = (25, 50, 100, 200)
GRID_COMPUTED = (8, 10, 12, 14, 17, 20, 25)
GRID_FULL = (50, 28)
"""Calls of the samplers whose accuracy plans have to reach with fewer."""
GUIDANCES = (1.0, 3.5, 6.0)
SHIFTS = (1.0, 3.0)


@dataclass(frozen=True)
class Point:
    """A point to measure: a method at a setup, and the number of calls that it may cost."""

    setup: Setup
    method: str
    allowed: int

    @property
    def name(self) -> str:
        """The key of its row."""
        return f"{self.setup} | {self.method} | {self.allowed}"


def list_points(subject: Subject, options: argparse.Namespace) -> Iterator[Point]:
    """Yields the points of a model for the part that the options name."""
    if options.part == "fidelity":
        setups = list_setups(subject, options)
        for setup in setups:
            yield from list_fidelity(subject, setup, options, SPEEDS)
        if setups[0] == THOROUGH[setups[0].model][0]:
            yield from list_fidelity(subject, setups[0], options, MORE_SPEEDS)
    elif options.part == "grids":
        yield from list_grids(subject, options)
    elif options.part == "guidance" and is_flow(subject.model.scheduler):
        yield from list_guidance(subject, options)


def list_setups(subject: Subject, options: argparse.Namespace) -> list[Setup]:
    """Returns the setups of a model, those that are compared most closely first."""
    name = subject.model.name
    base = subject.model.scheduler
    samplers = (name_samplers(base)[0], *OTHERS[name])
    found = [Setup(name, each, calls) for each in samplers for calls in CALLS]
    if options.smoke:
        return [Setup(name, samplers[0], 6)]
    found = list(dict.fromkeys((*THOROUGH[name], *found)))
    return [
        setup
        for setup in found
        if setup.sampler in (options.samplers or (setup.sampler,))
        and setup.calls in (options.calls or (setup.calls,))
    ]


def list_fidelity(
    subject: Subject, setup: Setup, options: argparse.Namespace, speeds: Sequence[float]
) -> Iterator[Point]:
    """Yields the points of one setup at some speeds."""
    wanted = options.methods or (FEWER, *METHODS)
    num_calls = subject.loop(setup, subject.seen).num_calls
    counts = [max(2, round(num_calls / speed)) for speed in speeds]
    if speeds == SPEEDS:
        yield Point(setup, FULL, num_calls)
    if FEWER in wanted:
        for name in name_samplers(subject.model.scheduler):
            yield from (Point(setup, f"{FEWER}, {name}", count) for count in counts)
    for name in (name for name in METHODS if name in wanted):
        method = METHODS[name]
        if not options.smoke and not is_measured(setup, method):
            continue
        if not method.is_fixed:
            yield from (Point(setup, name, count) for count in counts)
        elif speeds == SPEEDS:
            yield Point(setup, name, num_calls)


def is_measured(setup: Setup, method: Method) -> bool:
    """Returns True for methods that are measured at the setup: not all are at all setups."""
    if method in (AUTO, *OTHER_SEEDS):
        return setup == THOROUGH[setup.model][0]
    if setup in THOROUGH[setup.model]:
        return True
    return not (method.is_peer or method.is_fixed) or setup in PEER_SETUPS


def list_grids(subject: Subject, options: argparse.Namespace) -> Iterator[Point]:
    """Yields few steps of all samplers, and plans with as few calls on finer grids."""
    name = subject.model.name
    samplers = name_samplers(subject.model.scheduler)[: 2 if options.smoke else None]
    counts: Sequence[int] = (3,) if options.smoke else GRID_COMPUTED
    for sampler in options.samplers or samplers:
        for calls in (6,) if options.smoke else GRID_FULL:
            yield Point(Setup(name, sampler, calls), FULL, calls)
        for count in counts:
            yield Point(Setup(name, sampler, count), FULL, count)
        for grid in (6,) if options.smoke else GRIDS:
            setup = Setup(name, sampler, grid)
            few = [count for count in counts if count <= 0.6 * grid]
            yield from (Point(setup, CALIBRATED.name, count) for count in few)


def list_guidance(subject: Subject, options: argparse.Namespace) -> Iterator[Point]:
    """Yields plans for several scales of guidance and shifts."""
    name, sampler = subject.model.name, name_samplers(subject.model.scheduler)[0]
    calls = 6 if options.smoke else THOROUGH[name][0].calls
    for guidance in GUIDANCES:
        for shift in SHIFTS:
            setup = Setup(name, sampler, calls, guidance, shift)
            yield Point(setup, FULL, calls)
            for speed in SPEEDS if options.smoke else sorted((*SPEEDS, *MORE_SPEEDS)):
                yield Point(setup, CALIBRATED.name, round(calls / speed))
