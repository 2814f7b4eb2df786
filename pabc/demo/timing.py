"""Variants of one model, generating the same clips in turn against the clock.

Shapes: N clips, F frames, H = W pixels.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from pabc.demo import sampling
from pabc.demo.latte import Demo

Progress = Callable[[int, str], Any]
"""Makes a progress bar of a length and a label: a context manager with `update(count)`."""


@dataclass(frozen=True)
class Round:
    """What every variant generates once: one clip per caption, from the same noise."""

    captions: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class Variant:
    """One way to run the model; `transformer` is called in the model's place at every step."""

    name: str
    transformer: Any
    about: str
    is_compiled: bool = True


@dataclass
class Run:
    """What one variant did.

    Attributes:
        first_seconds: of its first generation, which compiles; not among `seconds`.
        seconds: of each later generation, one per round.
        batches: the clips (N, F, H, W) of each round.
    """

    first_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    batches: list[torch.Tensor] = field(default_factory=list)

    @property
    def clips(self) -> torch.Tensor:
        """All clips of all rounds, (N, F, H, W)."""
        return torch.cat(self.batches)

    @property
    def compile_seconds(self) -> float:
        """Wall time of the first generation beyond that of a steady one: capture and compiling."""
        return max(0.0, self.first_seconds - statistics.median(self.seconds))


def race(
    demo: Demo,
    variants: Sequence[Variant],
    rounds: Sequence[Round],
    *,
    steps: int,
    progress: Progress,
) -> dict[str, Run]:
    """Runs each variant once per round, interleaved, the order rotated from round to round.

    Before that each generates once to compile and warm up, with an empty Inductor cache of its
    own, so that no variant lives on what another (or an earlier run) has compiled.
    """
    runs = {variant.name: Run() for variant in variants}
    for variant in variants:
        verb = "compile" if variant.is_compiled else "warm up"
        with progress(steps, f"{verb} {variant.name}") as bar, _empty_cache(variant.is_compiled):
            seconds, _ = _generate(demo, variant, rounds[0], steps, bar)
        runs[variant.name].first_seconds = seconds
    with progress(len(rounds) * len(variants), "generate in turn") as bar:
        for index, batch in enumerate(rounds):
            shift = index % len(variants)
            for variant in (*variants[shift:], *variants[:shift]):
                seconds, clips = _generate(demo, variant, batch, steps)
                runs[variant.name].seconds.append(seconds)
                runs[variant.name].batches.append(clips)
                bar.update(1)
    return runs


def _generate(
    demo: Demo,
    variant: Variant,
    batch: Round,
    steps: int,
    bar: Any = None,
) -> tuple[float, torch.Tensor]:
    """Seconds and clips of one generation; the clips' way to the CPU waits for the device."""
    start = perf_counter()
    clips = sampling.sample(
        demo,
        list(batch.captions),
        transformer=variant.transformer,
        steps=steps,
        seed=batch.seed,
        progress=None if bar is None else lambda *_: bar.update(1),
    )
    return perf_counter() - start, clips


def _empty_cache(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    if not wanted:
        return contextlib.nullcontext()
    from torch._inductor.utils import fresh_cache

    return fresh_cache()
