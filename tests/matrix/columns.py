"""What is tried of each row. A column is a function from a :class:`Trial` to a cell.

A value, `yes`, or `no: REASON`. What raises is a `no` with its message.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn

import pabc

from . import offload, ranks
from .lora import follows_adapters
from .row import NUM_STEPS, Cell, denoisers
from .trial import Trial, describe, is_equal


def find_capture(trial: Trial) -> Cell:
    explanations = trial.captured.explanations
    for each in explanations:
        if each.uncaptured is not None:
            return f"no: {each.uncaptured}"
    outside = [line for each in explanations for line in each.outside]
    return f"in part: {outside[0]}" if outside else "yes"


def find_kinds(trial: Trial) -> Cell:
    return ", ".join(trial.captured.kinds)


def keeps_bits(trial: Trial) -> Cell:
    return is_equal(trial.captured.first, trial.expected())


def reuses(trial: Trial) -> Cell:
    """Reuse of every kind, at every other step."""
    captured = trial.captured
    found = captured.run(lambda ts: pabc.Schedule.pyramid(ts, **dict.fromkeys(captured.kinds, 2)))
    stats = [model.stats for model in captured.models]
    lost = [reason for each in stats for reason in each.fallbacks]
    if lost or not all(each.reused for each in stats):
        return f"no: what was to be reused was computed ({', '.join(lost) or 'no slot'})"
    if not found.isfinite().all() or torch.equal(found, trial.expected()):
        return "no: reuse changes nothing"
    return "yes"


def plans_itself(trial: Trial) -> Cell:
    """`pabc.auto`: a generation is recorded, those after it make fewer calls. Where one call of the
    pipeline runs several, it is the first of them that is recorded."""
    request = pabc.auto(calls=NUM_STEPS - 2, floor=1.0, cache=False, candidates=1)
    with pabc.compile_pipeline(trial.row.make(), request, backend="original") as fast:
        models = fast.models.values()
        first = trial.row.run(fast)
        is_plain = torch.equal(first, trial.expected())
        if not is_plain and not any(model.stats.reused for model in models):
            return "no: the recorded generation is not the plain one"
        trial.row.run(fast, seed=1)
        stats = [model.stats for model in models]
    if not any(each.reused for each in stats):
        return f"no: {stats[0].plan_source}"
    return "yes" if stats[0].recorded == 1 else "no: the second generation was recorded, too"


def count_calls(trial: Trial) -> Cell:
    """Calls of the model a step, and the samples of each where there are several: `2`, `1 of 2`."""
    batches: list[int] = []
    num_steps, scheduler = 0, trial.plain.scheduler
    step = type(scheduler).step

    def look(_: nn.Module, args: Any, kwargs: Any) -> None:
        batches.append(len(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]))

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal num_steps
        num_steps += self is scheduler  # and no copy of it
        return step(self, *args, **kwargs)

    parts = denoisers(trial.plain).values()
    handles = [part.register_forward_pre_hook(look, with_kwargs=True) for part in parts]
    with mock.patch.object(type(scheduler), "step", count):
        trial.row.run(trial.plain)
    for handle in handles:
        handle.remove()
    per_step = batches[: len(batches) // num_steps]
    assert batches == per_step * num_steps, "not every step makes the same calls"
    sizes = "" if max(batches) == 1 else f" of {', '.join(map(str, per_step))}"
    return f"{len(per_step)}{sizes}"


def changes_sizes(trial: Trial) -> Cell:
    """Another number of steps, another size, and the first ones again."""
    captured = trial.captured
    at_first = max(model.stats.captures for model in captured.models)
    for asked in ({"num_steps": NUM_STEPS + 2}, {"size": 1}, {}):
        found = captured.run(pabc.Schedule.none, **asked)
        if not torch.equal(found, trial.expected(**asked)):
            return f"no: not equal with {asked}"
    captures = max(model.stats.captures for model in captured.models)
    return "yes" if captures <= 2 * at_first else f"no: {captures} captures, {at_first} at first"


def equals_oracle(trial: Trial) -> Cell:
    """Reuse of every kind, against the graph that asks at each region whether it is reused."""
    captured = trial.captured

    def make_schedule(ts: Any) -> pabc.Schedule:
        return pabc.Schedule.pyramid(ts, **dict.fromkeys(captured.kinds, 2))

    with pabc.compile_pipeline(trial.row.make(), make_schedule, backend="oracle") as oracle:
        return is_equal(captured.run(make_schedule), trial.row.run(oracle))


@dataclass(frozen=True)
class Column:
    """A column: its title, what fills a cell, and whether every run of the tests checks it."""

    name: str
    title: str
    fill: Callable[[Trial], Cell]
    is_cheap: bool = False

    def __call__(self, trial: Trial) -> Cell:
        """Returns the row's cell. Raises what the plain pipeline does: then the row is wrong."""
        if self.name in trial.row.untried:
            return f"untried: {trial.row.untried[self.name]}".removesuffix(": ")
        trial.expected()
        try:
            with quietly():
                return self.fill(trial)
        except Exception as error:
            return f"no: {describe(error)}"


@contextmanager
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


COLUMNS = (
    Column("captured", "captured", find_capture, is_cheap=True),
    Column("kinds", "kinds", find_kinds, is_cheap=True),
    Column("bits", "same bits", keeps_bits, is_cheap=True),
    Column("reuse", "reuse", reuses, is_cheap=True),
    Column("auto", "`auto`", plans_itself, is_cheap=True),
    Column("guidance", "calls a step", count_calls, is_cheap=True),
    Column("oracle", "reuse as told", equals_oracle),
    Column("lora", "LoRA", follows_adapters),
    Column("model_offload", "model offload", offload.offloads_models),
    Column("group_offload", "group offload", offload.offloads_groups),
    Column("sequential_offload", "sequential offload", offload.offloads_layers),
    Column("casting", "layerwise casting", offload.casts_layers),
    Column("ranks", "2 ranks", ranks.equals_one_rank),
    Column("sizes", "sizes, steps", changes_sizes),
)
