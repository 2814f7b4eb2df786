"""Times variants of one model, which take turns to generate the same samples.

Shapes: N samples, clips or pictures.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from time import perf_counter
from typing import Any

import torch

from pabc.demo.launch import Launch
from pabc.demo.model import Model

Progress = Callable[[int, str], Any]
"""A function of length and label that makes a progress bar: a context manager with `update`."""


@dataclass(frozen=True)
class Round:
    """A batch that every variant generates once, from the same noise: one clip per caption."""

    captions: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    Attributes:
        name: its name in tables.
        transformer: is called in place of the model at every step.
        about: a description for the reader.
        timesteps: those of its sampler, one per step.
        whole: the name of the variant that runs the same code and leaves nothing out.
        is_compiled: True if its first generation compiles.
        ranks: the number of processes that run it; one of 1 runs in the first, and the others wait.
    """

    name: str
    transformer: Any
    about: str
    _: KW_ONLY
    timesteps: tuple[float, ...]
    whole: str
    is_compiled: bool = True
    ranks: int = 1

    @property
    def steps(self) -> int:
        """The number of steps of its sampler."""
        return len(self.timesteps)


@dataclass
class Run:
    """The measurements of one variant.

    Attributes:
        first_seconds: seconds of its first generation, which compiles; not among `seconds`.
        seconds: seconds of each later generation, one per round.
        batches: the samples (N, ...) in [-1, 1] of each round.
    """

    first_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    batches: list[torch.Tensor] = field(default_factory=list)

    @property
    def samples(self) -> torch.Tensor:
        """The samples of all rounds, (N, ...) in [-1, 1]."""
        return torch.cat(self.batches)

    @property
    def compile_seconds(self) -> float:
        """The wall time of capturing and compiling: the first generation's, less a later one's."""
        return max(0.0, self.first_seconds - statistics.median(self.seconds))


def race(
    model: Model,
    variants: Sequence[Variant],
    rounds: Sequence[Round],
    *,
    processes: Launch,
    progress: Progress | None = None,
) -> dict[str, Run]:
    """Times all variants, interleaved: each generates once per round, in an order that rotates.

    Before that, each generates once to compile and warm up, with an empty Inductor cache of its
    own, so that no variant profits from code that another variant, or an earlier run, compiled.
    """
    progress = progress or _Silent
    runs = {variant.name: Run() for variant in variants}
    for variant in variants:
        verb = "compile" if variant.is_compiled else "warm up"
        label = f"{verb} {variant.name}"
        with progress(variant.steps, label) as bar, _empty_cache(variant.is_compiled):
            generated = _generate(model, variant, rounds[0], processes, bar)
        if generated is not None:
            runs[variant.name].first_seconds = generated[0]
    with progress(len(rounds) * len(variants), "generate in turn") as bar:
        for index, batch in enumerate(rounds):
            shift = index % len(variants)
            for variant in (*variants[shift:], *variants[:shift]):
                generated = _generate(model, variant, batch, processes)
                if generated is not None:
                    runs[variant.name].seconds.append(generated[0])
                    runs[variant.name].batches.append(generated[1])
                bar.update(1)
    return runs


def _generate(
    model: Model,
    variant: Variant,
    batch: Round,
    processes: Launch,
    bar: Any = None,
) -> tuple[float, torch.Tensor] | None:
    """Returns seconds and samples of one generation; None if this process has no part in it.

    The copy of the samples to the CPU waits for the device.
    """
    processes.wait()
    if variant.ranks == 1 and not processes.is_first:
        return None
    start = perf_counter()
    samples = model.generate(
        variant.transformer,
        list(batch.captions),
        model.noise(batch.seed, len(batch.captions)),
        num_steps=variant.steps,
        progress=None if bar is None else lambda *_: bar.update(1),
    )
    return perf_counter() - start, samples


class _Silent:
    """A progress bar that is not shown."""

    def __init__(self, length: int, label: str) -> None:
        pass

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def update(self, count: int) -> None:
        """Does nothing."""


def _empty_cache(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    if not wanted:
        return contextlib.nullcontext()
    from pabc.internals.inductor import fresh_cache

    return fresh_cache()
