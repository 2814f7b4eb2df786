"""Reuses regions within the calls that a plan computes: the second level, measured only.

A region is a part of half of the blocks: their attention, their MLPs, or what the blocks add to
their input. At a computed step it may be held, or continued on a line through its last two values.
Which regions are, and where, is chosen greedily by the error on the seen clips per operation saved.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from case import Ready
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from pareto_methods import Choice, count_call, run_choice
from pareto_setups import Loop, Operations, Recorded
from torch import Tensor, nn

from pabc.calibration.candidates import Candidate
from pabc.calibration.updates import Updates

RULES = ("hold", "linear")


class Region(NamedTuple):
    """Modules that are reused together.

    Attributes:
        name: for readers.
        paths: of the modules in the model.
        is_residual: whether what they add to their input is reused, not their output.
    """

    name: str
    paths: tuple[str, ...]
    is_residual: bool


class Reuse(NamedTuple):
    """A region that is reused at a step, by one of `RULES`."""

    step: int
    region: Region
    rule: str


@dataclass(frozen=True)
class RegionPlan:
    """A plan of whole calls, and the regions that are reused within those that it computes."""

    base: Candidate
    reuses: tuple[Reuse, ...]

    @property
    def name(self) -> str:
        """The plan of whole calls, and how many regions are reused."""
        return f"{len(self.reuses)} regions within {len(self.base.computed)} of {self.base.name}"

    @property
    def computed(self) -> tuple[int, ...]:
        """The steps that call the model."""
        return self.base.computed

    def choose(self, timesteps: Sequence[float]) -> Choice:
        """Returns what runs the plan, and counts its operations."""

        def prepare(loop: Loop) -> Ready:
            reused = ReusedRegions(loop.model.transformer, self.base, self.reuses)
            return Ready(reused.call, reused.at_step)

        return Choice(self.name, prepare)


def find_regions(model: nn.Module) -> list[Region]:
    """Returns the regions of a model: of each list of blocks, and of each half of it."""
    found = []
    for name, blocks in model.named_children():
        if not isinstance(blocks, nn.ModuleList) or len(blocks) < 2:
            continue
        middle = len(blocks) // 2
        for half, indices in (("first", range(middle)), ("second", range(middle, len(blocks)))):
            paths = tuple(f"{name}.{i}" for i in indices)
            found.append(Region(f"{name}, {half} half", paths, is_residual=True))
            for part in dict.fromkeys(part for i in indices for part in _parts(blocks[i])):
                own = tuple(f"{name}.{i}.{part}" for i in indices if part in _parts(blocks[i]))
                found.append(Region(f"{name}, {part}, {half} half", own, is_residual=False))
    return found


def _parts(block: nn.Module) -> list[str]:
    return [n for n, part in block.named_children() if isinstance(part, Attention | FeedForward)]


@dataclass
class _Kept:
    """The last two values of a module, the newest first, and their steps."""

    values: list[list[Tensor | None]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def add(self, step: int, value: list[Tensor | None]) -> None:
        """Keeps the value of a step."""
        self.values, self.steps = [value, *self.values[:1]], [step, *self.steps[:1]]

    def forecast(self, step: int, rule: str) -> list[Tensor | None]:
        """Returns the value at a step that follows from those that are kept."""
        if rule == "hold" or len(self.steps) < 2:
            return self.values[0]
        slope = (step - self.steps[0]) / (self.steps[0] - self.steps[1])
        pairs = zip(*self.values, strict=True)
        return [None if a is None or b is None else a + slope * (a - b) for a, b in pairs]


class ReusedRegions:
    """Skips calls of a model by a plan, and reuses regions within those that it computes."""

    def __init__(self, model: nn.Module, base: Candidate, reuses: Iterable[Reuse]) -> None:
        self._model, self._base, self._reuses = model, base, tuple(reuses)
        self._kept: dict[tuple[str, bool], _Kept] = {}
        self._outputs: list[Tensor] = []
        self._step = 0

    def call(self, **kwargs: Any) -> tuple[Tensor]:
        """Computes the call of a step, or returns the weighted sum of outputs before it."""
        if self._step in self._base.computed:
            self._outputs.insert(0, self._model(**kwargs)[0])
            return (self._outputs[0],)
        pairs = zip(self._base.weights[self._step], self._outputs, strict=False)
        return (torch.stack([weight * output for weight, output in pairs]).sum(0),)

    def sharing(self, reuse: Reuse) -> ReusedRegions:
        """Returns what reuses one region by the values that are kept here."""
        other = ReusedRegions(self._model, self._base, (reuse,))
        other._kept = self._kept
        return other

    @contextmanager
    def at_step(self, step: int, timestep: float) -> Iterator[None]:
        """Keeps, or reuses, what modules give during the call of a step."""
        self._step = step
        with ExitStack() as stack:
            rules = {r.region: r.rule for r in self._reuses if r.step == step}
            for region in dict.fromkeys(r.region for r in self._reuses):
                for path in region.paths:
                    module = self._model.get_submodule(path)
                    kept = self._kept.setdefault((path, region.is_residual), _Kept())
                    rule = rules.get(region)
                    inner = module.forward
                    outer = _reuse(inner, kept, step, rule, is_residual=region.is_residual)
                    module.forward = outer  # type: ignore[method-assign]
                    stack.callback(_restore, module, inner)
            yield


def _restore(module: nn.Module, inner: Callable[..., Any]) -> None:
    """Gives a module the forward that it had: its class' own is no attribute of the module."""
    if getattr(inner, "__self__", None) is module:
        module.__dict__.pop("forward", None)
    else:
        module.forward = inner  # type: ignore[method-assign]


def _reuse(
    inner: Callable[..., Any], kept: _Kept, step: int, rule: str | None, *, is_residual: bool
) -> Callable[..., Any]:
    """Returns a forward that keeps what `inner` gives, or, by a rule, returns what follows."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if rule is None or not kept.values:
            found = inner(*args, **kwargs)
            parts = list(found) if isinstance(found, tuple) else [found]
            sign = -1 if is_residual else 0
            kept.add(step, [_add(part, inputs, sign) for part in parts])
            return found
        sign = 1 if is_residual else 0
        parts = [_add(part, inputs, sign) for part in kept.forecast(step, rule)]
        return tuple(parts) if len(parts) > 1 else parts[0]

    return forward


def _add(part: Tensor | None, inputs: Sequence[Tensor], sign: int) -> Tensor | None:
    """Returns an output with the input of its shape added (1), subtracted (-1), or as it is."""
    if part is None or not sign:
        return part
    return part + sign * next(x for x in inputs if x.shape == part.shape)


@dataclass
class Greedy:
    """Chooses regions one by one.

    Attributes:
        loop: over the seen clips.
        full: their full run.
        updates: its sampler.
        base: the plan of whole calls.
        limit: the most regions, each at a step and by a rule, that are tried in runs.
    """

    loop: Loop
    full: Recorded
    updates: Updates
    base: Candidate
    limit: int = 40

    def choose(self, calls: float) -> RegionPlan:
        """Returns the plan that takes at least so many calls' operations less than `base`.

        What a region costs is measured again before it is taken, since it depends on the others:
        of those in order of their last known costs, the first whose new one is still the lowest.
        """
        plan = RegionPlan(self.base, ())
        error, share = self._measure(plan)
        wanted = share - calls / self.loop.num_calls
        queue = [(-math.inf, i, reuse) for i, reuse in enumerate(self.screen())]
        while share > wanted and queue:
            _, index, reuse = heapq.heappop(queue)
            changed = RegionPlan(self.base, (*plan.reuses, reuse))
            new_error, new_share = self._measure(changed)
            if new_share >= share - 1e-9:
                continue  # part of what is reused already
            cost = (new_error - error) / (share - new_share)
            if queue and cost > queue[0][0]:
                heapq.heappush(queue, (cost, index, reuse))
                continue
            plan, error, share = changed, new_error, new_share
            queue = [each for each in queue if each[2][:2] != reuse[:2]]
            heapq.heapify(queue)
        return plan

    def screen(self) -> list[Reuse]:
        """Returns the regions with the least error in the next latents per operation saved, each
        alone, on the recorded latents."""
        regions = find_regions(self.loop.model.transformer)
        model, costs = self.loop.model.transformer, list[tuple[float, Reuse]]()
        watch = ReusedRegions(model, self.base, [Reuse(-1, region, "hold") for region in regions])

        def call(**kwargs: Any) -> tuple[Tensor]:
            step = next(steps)
            if step not in self.base.computed:
                return (self.full.outputs[step],)
            if step:
                tried = [Reuse(step, region, rule) for region in regions for rule in RULES]
                costs.extend((self._estimate(watch, reuse, kwargs), reuse) for reuse in tried)
            with watch.at_step(step, 0.0):
                return watch.call(**kwargs)

        steps = iter(range(self.loop.num_calls))
        with torch.no_grad():
            self.loop.run(call)
        costs.sort(key=lambda each: each[0])
        return [reuse for _, reuse in costs[: self.limit]]

    def _estimate(self, watch: ReusedRegions, reuse: Reuse, kwargs: Any) -> float:
        """Returns the squared error in the next latents by a region, per operation saved."""
        step = reuse.step
        reused = watch.sharing(reuse)
        with Operations() as counted, reused.at_step(step, 0.0):
            (found,) = reused.call(**kwargs)
        branches = (found - self.full.outputs[step]).chunk(self.updates.outputs.shape[1])
        weights = self.updates.outputs[step, :, 0]
        error = sum(float(w) * branch for w, branch in zip(weights, branches, strict=True))
        saved = 1 - counted.total / count_call(self.loop)
        return float(torch.as_tensor(error).double().square().mean()) / max(saved, 1e-9)

    def _measure(self, plan: RegionPlan) -> tuple[float, float]:
        """Returns the mean squared error, and the share of the full run's operations."""
        samples, share = run_choice(self.loop, plan.choose(self.loop.sampler.timesteps))
        return float((samples - self.full.samples).double().square().mean()), share
