"""What is tried of each row. A column is a function from a :class:`Trial` to a cell.

A value, `yes`, or `no: REASON`. What raises is a `no` with the message: `fill` sees to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import pabc

from . import ranks
from .lora import follows_adapters
from .row import NUM_STEPS, Cell, Row, denoisers

CPU = torch.device("cpu")


class Trial:
    """A row, and what several columns need of it, made once.

    Attributes:
        row: the row.
        plain: the plain pipeline.
    """

    def __init__(self, row: Row) -> None:
        self.row = row
        self._outputs: dict[tuple[int, int, int], Tensor] = {}

    @cached_property
    def plain(self) -> Any:
        return self.row.make()

    def expected(self, seed: int = 0, num_steps: int = NUM_STEPS, size: int = 0) -> Tensor:
        """Returns what the plain pipeline gives."""
        key = seed, num_steps, size
        if key not in self._outputs:
            made = self.row.run(self.plain, seed=seed, num_steps=num_steps, size=size)
            assert made.isfinite().all(), "the small pipeline's latents are not finite"
            self._outputs[key] = made
        return self._outputs[key]

    @cached_property
    def captured(self) -> Captured:
        """The pipeline with captured models, after a generation that reused nothing."""
        return Captured(self.row)


class Captured:
    """A compiled pipeline whose schedule is set from outside, and what it gave first."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.make_schedule: Callable[..., pabc.Schedule] = pabc.Schedule.none
        self.pipe = pabc.compile_pipeline(
            row.make(), lambda ts: self.make_schedule(ts), backend="eager"
        )
        self.first = row.run(self.pipe)
        self.models = list(self.pipe.models.values())
        self.explanations = [model.explain() for model in self.models]

    @property
    def kinds(self) -> list[str]:
        return sorted({region.kind for each in self.explanations for region in each.regions})

    def run(self, make_schedule: Callable[..., pabc.Schedule], **asked: Any) -> Tensor:
        self.make_schedule = make_schedule
        return self.row.run(self.pipe, **asked)


def find_capture(trial: Trial) -> Cell:
    explanations = trial.captured.explanations
    for each in explanations:
        if each.uncaptured is not None:
            return f"no: {each.uncaptured}"
    outside = [line for each in explanations for line in each.outside]
    return f"no: in part; {outside[0]}" if outside else "yes"


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


def offloads_models(trial: Trial) -> Cell:
    """Whole models that move between calls, which are captured as without."""
    pipe = trial.row.make()
    pipe.enable_model_cpu_offload(device="cpu")
    with pabc.compile_pipeline(pipe, pabc.Schedule.none, backend="eager") as fast:
        found = [trial.row.run(fast) for _ in range(2)]
        captures = [model.stats.captures for model in fast.models.values()]
    if any(captured != 1 for captured in captures):
        return f"no: captured {max(captures)} times"
    return is_equal(torch.cat(found), trial.expected().repeat(2))


def offloads_groups(trial: Trial) -> Cell:
    from diffusers.hooks import apply_group_offloading

    def offload(pipe: Any) -> None:
        for model in denoisers(pipe).values():
            apply_group_offloading(model, CPU, CPU, "leaf_level")

    return skips_calls(trial, offload)


def offloads_layers(trial: Trial) -> Cell:
    """What `enable_sequential_cpu_offload` does to each model. On a CPU that itself fails: it names
    the device `cpu:0`, which accelerate then takes for another one than `cpu`."""
    from accelerate import cpu_offload

    def offload(pipe: Any) -> None:
        for model in denoisers(pipe).values():
            cpu_offload(model, CPU)
            assert any(parameter.is_meta for parameter in model.parameters())

    return skips_calls(trial, offload)


def skips_calls(trial: Trial, offload: Callable[[Any], None]) -> Cell:
    """Weights that move within a call: whole calls are skipped, as without."""

    def skip(timesteps: Any) -> pabc.Schedule:
        return pabc.Schedule.skip(timesteps, len(timesteps) // 2 + 1)

    found = []
    for put_on in (offload, lambda _: None):
        pipe = trial.row.make()
        put_on(pipe)
        with pabc.compile_pipeline(pipe, skip, backend="original") as fast:
            found.append(trial.row.run(fast))
            if not any(model.stats.reused for model in fast.models.values()):
                return "no: no call is skipped"
    same = is_equal(*found)
    return "calls" if same == "yes" else same


def casts_layers(trial: Trial) -> Cell:
    """Weights that are kept as float8, and cast in each layer."""
    plain, pipe = trial.row.make(), trial.row.make()
    for each in (plain, pipe):
        for model in denoisers(each).values():
            model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with pabc.compile_pipeline(pipe, pabc.Schedule.none, backend="eager") as fast:
        return is_equal(trial.row.run(fast), trial.row.run(plain))


def changes_sizes(trial: Trial) -> Cell:
    """Another number of steps, another size, and the first ones again."""
    captured = trial.captured
    for asked in ({"num_steps": NUM_STEPS + 2}, {"size": 1}, {}):
        found = captured.run(pabc.Schedule.none, **asked)
        if not torch.equal(found, trial.expected(**asked)):
            return f"no: not equal with {asked}"
    captures = max(model.stats.captures for model in captured.models)
    return "yes" if captures <= 2 else f"no: {captures} captures for two sizes"


def equals_oracle(trial: Trial) -> Cell:
    """Reuse of every kind, against the graph that asks at each region whether it is reused."""
    captured = trial.captured

    def make_schedule(ts: Any) -> pabc.Schedule:
        return pabc.Schedule.pyramid(ts, **dict.fromkeys(captured.kinds, 2))

    with pabc.compile_pipeline(trial.row.make(), make_schedule, backend="oracle") as oracle:
        return is_equal(captured.run(make_schedule), trial.row.run(oracle))


def is_equal(found: Tensor, expected: Tensor) -> Cell:
    if torch.equal(found, expected):
        return "yes"
    return f"no: differs by {(found - expected).abs().max().item():.1e}"


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


def describe(error: Exception) -> str:
    """Returns the first line of an error."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


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
    Column("model_offload", "model offload", offloads_models),
    Column("group_offload", "group offload", offloads_groups),
    Column("sequential_offload", "sequential offload", offloads_layers),
    Column("casting", "layerwise casting", casts_layers),
    Column("ranks", "2 ranks", ranks.equals_one_rank),
    Column("sizes", "sizes, steps", changes_sizes),
)
