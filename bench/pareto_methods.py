"""Defines what a method of `pareto.py` is: a way to run a loop with fewer operations.

A method chooses its settings for a number of calls on the clips that methods may see, and is judged
on others. Where a method cannot be told how many calls to compute, all its settings are tried, and
the best of those that take no more operations is chosen.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from case import Ready
from pareto_quality import mean_psnr
from pareto_setups import Loop, Operations, Setup, Subject
from torch import Tensor

import pabc

TOLERANCE = 1.04
"""A setting may take so many times the operations of the calls that are asked for."""


class NotReached(Exception):
    """Raised if no setting of a method takes as few operations as asked for."""


METHOD_ERRORS = (NotReached, ImportError)
"""The errors of a method that has no setting, or is not installed."""


@dataclass(frozen=True)
class Choice:
    """Settings of a method.

    Attributes:
        setting: a description for readers.
        prepare: makes what is called in a loop.
        computed: calls that it computes, where it skips whole ones.
        share: of the full run's operations; None: they are counted.
        facts: what else is worth a note, such as the predicted PSNR.
        schedule: of pabc, where it is one.
    """

    setting: str
    prepare: Callable[[Loop], Ready]
    computed: int | None = None
    share: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    schedule: pabc.Schedule | None = None


Choose = Callable[[Subject, Setup, int], Choice]
"""(subject, setup, number of calls) -> settings that cost no more. Raises NotReached."""


@dataclass(frozen=True)
class Method:
    """A method by name.

    Attributes:
        about: a description for readers.
        choose: its settings for a number of calls.
        is_peer: True for what is not pabc's own.
        is_fixed: True if it has one setting, whatever the number of calls.
    """

    name: str
    about: str
    choose: Choose
    is_peer: bool = True
    is_fixed: bool = False


def run_choice(loop: Loop, choice: Choice) -> tuple[Tensor, float]:
    """Returns the samples, and the share of the full run's operations that were made."""
    ready = choice.prepare(loop)
    with torch.no_grad(), Operations() as counted:
        samples = loop.run(ready.call, ready.on_step)  # type: ignore[arg-type]
    ready.on_end()
    if choice.share is not None:
        return samples, choice.share
    return samples, counted.total / (loop.num_calls * count_call(loop))


def count_call(loop: Loop) -> int:
    """Returns the operations of one call of the model."""
    return _count_call(loop.model, len(loop.clips.prompts))


class _Done(Exception):
    pass


@functools.cache
def _count_call(model: Any, num_clips: int) -> int:
    def call(*args: Any, **kwargs: Any) -> Any:
        model.transformer(*args, **kwargs)
        raise _Done

    with Operations() as counted, contextlib.suppress(_Done):
        model.generate(call, model.prompts(0, num_clips), model.noise(0, num_clips))
    return counted.total


def choose_best(
    name: str, make_choices: Callable[[Subject, Setup, int], Sequence[Choice]]
) -> Choose:
    """Returns a method that tries settings, and takes the best that costs no more calls.

    `make_choices` returns the settings to try for a number of calls. Settings are told apart by
    their descriptions.
    """

    def choose(subject: Subject, setup: Setup, computed: int) -> Choice:
        loop = subject.loop(setup, subject.seen)
        reference = subject.recorded(setup).samples
        best: tuple[float, Choice] | None = None
        for choice in make_choices(subject, setup, computed):

            def measure(choice: Choice = choice) -> tuple[float, float]:
                samples, share = run_choice(loop, choice)
                return mean_psnr(samples, reference), share

            psnr, share = subject.keep(setup, ("trial", name, choice.setting), measure)
            if share <= TOLERANCE * computed / loop.num_calls and (not best or psnr > best[0]):
                best = psnr, choice
        if best is None:
            raise NotReached(f"{name}: no setting takes as few operations as {computed} calls")
        return best[1]

    return choose
