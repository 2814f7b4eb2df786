"""Sets up ways to skip whole calls of the model, all with the same number of computed calls.

pabc's `Schedule.skip` takes that number, as do fewer steps of the sampler, which cost nothing. The
caches of diffusers do not: each is tried with several settings. Of those whose number of computed
calls is nearest, the one whose result is closest to the full run's is taken. A user, who does not
have the full run, could not choose so well: the choice is in their favor.

For FirstBlockCache and MagCache, Latte's blocks are in pairs (bench/pairs.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from caches import calibrate_mag_cache, with_cache
from case import Case, Ready
from diffusers import hooks
from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS
from pairs import is_paired, pair_blocks
from torch import Tensor, nn
from workloads import denoise, no_context

import pabc
from pabc.plan import SlotSpec

NUM_BISECTIONS = 8


@dataclass(frozen=True)
class Trial:
    """A cache's settings, the calls that it computes, and its distance from the full run."""

    config: Any
    computed: int
    error: float


def prepare_paired(case: Case) -> Case:
    """Returns the case with blocks that FirstBlockCache and MagCache can follow."""
    workload = case.workload
    model = pair_blocks(case.model, workload.latents[1])

    def call(*inputs: Tensor) -> dict[str, Any]:
        return {**workload.call(*inputs), "enable_temporal_attentions": False}

    return replace(case, workload=replace(workload, call=call)) if is_paired(model) else case


@contextmanager
def counting(model: nn.Module) -> Iterator[list[int]]:
    """Counts the calls that compute the last block: the length of the list."""
    lists = [m for name, m in model.named_children() if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS]
    if not lists:
        raise ValueError("expected a list of blocks of a name that diffusers knows, found none")
    last = [m for m in lists[-1].modules() if isinstance(m, nn.Linear)][-1]
    calls: list[int] = []
    handle = last.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


def try_config(case: Case, config: Any, reference: Tensor) -> Trial:
    """Generates once with a cache, and disables it."""
    ready = with_cache(case.model, config)
    with counting(case.model) as calls:
        latents = case.generate(ready)
    ready.on_end()
    case.model.disable_cache()  # type: ignore[operator]
    error = float((latents - reference).float().square().mean())
    return Trial(config, len(calls), error if error == error else float("inf"))


def find_threshold(
    case: Case, make_config: Callable[[float], Any], reference: Tensor
) -> list[Trial]:
    """Tries thresholds, by bisection, until one computes as many calls as it should."""
    low, high = 1e-4, 10.0
    trials: list[Trial] = []
    while len(trials) < NUM_BISECTIONS:
        middle = (low * high) ** 0.5
        trials.append(try_config(case, make_config(middle), reference))
        if trials[-1].computed == case.computed:
            break
        low, high = (middle, high) if trials[-1].computed > case.computed else (low, middle)
    return trials


def choose(case: Case, trials: Iterable[Trial]) -> Ready:
    """Returns the cache with the settings that were best, of those nearest to equal work."""
    best = min(trials, key=lambda trial: (abs(trial.computed - case.computed), trial.error))
    settings = [f"{name} {value:g}" for name, value in vars(best.config).items() if is_shown(value)]
    note = f"{best.computed} of {case.num_steps} calls computed: {', '.join(settings)}"
    return with_cache(case.model, best.config, note)


def is_shown(value: Any) -> bool:
    """Returns True for settings that are numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@torch.no_grad()
def run_full(case: Case) -> Tensor:
    """Returns the latents of the full run."""
    return denoise(case.workload, case.model, case.start, case.num_steps, no_context)


def run_fewer_steps(case: Case) -> Ready:
    """Prepares the model as it is, for as many steps as calls are computed."""
    return Ready(case.model, num_steps=case.computed)


def run_fewer_compiled(case: Case) -> Ready:
    """Compiles the model, for as many steps as calls are computed."""
    return Ready(torch.compile(case.model), num_steps=case.computed)


def run_skip(backend: str) -> Callable[[Case], Ready]:
    """Compiles the model with pabc; it skips calls by the rule of `Schedule.skip`."""

    def prepare(case: Case) -> Ready:
        schedule = pabc.Schedule.skip(case.schedule.timesteps, case.computed)
        return compile_skip(case, schedule, backend)

    return prepare


def compile_skip(case: Case, schedule: pabc.Schedule, backend: str) -> Ready:
    """Compiles the model with pabc and a schedule that skips calls."""
    fast = pabc.compile(case.model, schedule, backend=backend)  # type: ignore[arg-type]
    fast.prepare(**case.example)
    note = f"{case.computed} of {case.num_steps} calls computed: {schedule.label}"
    return Ready(fast, on_end=fast.reset, note=note)


def run_chosen_skip(case: Case) -> Ready:
    """Compiles the model with pabc; steps and weights are chosen as TaylorSeer's are."""
    reference, trials = run_full(case), []
    for pattern in find_patterns(case.num_steps, case.computed):
        steps = [i for i in range(case.num_steps) if pattern.computes(i)]
        rules = {
            "linear": "linear",
            "quadratic": "quadratic",
            "Taylor, order 2": weigh(steps, case.num_steps),
        }
        for name, forecast in rules.items():
            label = f"{pattern}, {name}"
            schedule = pabc.Schedule.skip(
                case.schedule.timesteps, steps, forecast=forecast, label=label
            )
            trials.append((skip_in_loop(case, schedule, reference), label, schedule))
    return compile_skip(case, min(trials)[-1], "inductor")


def weigh(computed: list[int], num_steps: int) -> list[list[float]]:
    """Returns the weights, newest value first, of TaylorSeer's sum of order 2 at each step."""
    rows: list[list[float]] = []
    for step in range(num_steps):
        last = [i for i in computed if i < step][-3:][::-1]
        if step in computed or len(last) < 3:
            rows.append([1.0])
            continue
        ahead, gap, before = step - last[0], last[0] - last[1], last[1] - last[2]
        first, second = ahead / gap, ahead**2 / (2 * gap)  # of v0 - v1, of the slopes' difference
        rows.append(
            [
                1 + first + second / gap,
                -first - second / gap - second / before,
                second / before,
            ]
        )
    return rows


def skip_in_loop(case: Case, schedule: pabc.Schedule, reference: Tensor) -> float:
    """Returns the mean squared error of a run that forecasts the model's output by hand."""
    plan = schedule.plan([SlotSpec("model", "model", 0)])
    outputs: list[Tensor | None] = []

    def call(**inputs: Any) -> tuple[Tensor]:
        step = len(outputs)
        sources, weights = plan.history(step, 0), plan.weights(step, 0)
        outputs.append(None if sources else case.model(**inputs)[0])
        terms = [w * outputs[i] for w, i in zip(weights, sources, strict=True)]
        return (sum(terms) if terms else outputs[-1],)

    latents = denoise(case.workload, call, case.start, case.num_steps, no_context)
    return float((latents - reference).float().square().mean())


@dataclass(frozen=True)
class Pattern:
    """The steps that TaylorSeer computes: the first, then every n-th, then perhaps the last."""

    warm_up: int
    interval: int
    end: int
    steps: int

    def computes(self, step: int) -> bool:
        """Returns True if the step computes."""
        in_turn = (step - self.warm_up - 1) % self.interval == 0
        return step < self.warm_up or in_turn or step >= self.end

    def __str__(self) -> str:
        last = f", all from step {self.end}" if self.end < self.steps else ""
        return f"all to step {self.warm_up - 1}, then every {self.interval} steps{last}"


def find_patterns(steps: int, computed: int) -> list[Pattern]:
    """Returns the patterns of that many steps with as many computed ones."""
    found = [
        Pattern(warm_up, interval, end, steps)
        for interval in range(2, 6)
        for end in (steps, steps - round(0.15 * steps))
        for warm_up in range(1, end)
    ]
    return [each for each in found if sum(map(each.computes, range(steps))) == computed]


def run_taylorseer(case: Case) -> Ready:
    """Enables TaylorSeer in its lite mode, which predicts the output of the last projection."""
    reference = run_full(case)
    configs = [
        hooks.TaylorSeerCacheConfig(
            use_lite_mode=True,
            cache_interval=pattern.interval,
            disable_cache_before_step=pattern.warm_up,
            disable_cache_after_step=pattern.end,
            max_order=order,
            taylor_factors_dtype=torch.float32,
        )
        for pattern in find_patterns(case.num_steps, case.computed)
        for order in (1, 2)
    ]
    return choose(case, [try_config(case, config, reference) for config in configs])


def run_first_block_cache(case: Case) -> Ready:
    """Enables FirstBlockCache with the threshold that computes as many calls."""
    reference, paired = run_full(case), prepare_paired(case)
    return choose_paired(
        paired,
        find_threshold(paired, lambda t: hooks.FirstBlockCacheConfig(threshold=t), reference),
    )


def run_mag_cache(case: Case) -> Ready:
    """Enables MagCache, calibrated, with the threshold that computes as many calls.

    It is tried with other limits of how many steps it may skip in a row.
    """
    reference, paired = run_full(case), prepare_paired(case)
    ratios = calibrate_mag_cache(paired.model, paired.num_steps, paired.generate)
    trials: list[Trial] = []
    for limit in (2, 3, 5):

        def make_config(threshold: float, limit: int = limit) -> Any:
            return hooks.MagCacheConfig(
                threshold=threshold,
                max_skip_steps=limit,
                num_inference_steps=case.num_steps,
                mag_ratios=ratios,
            )

        trials += find_threshold(paired, make_config, reference)
    return choose_paired(paired, trials)


def choose_paired(case: Case, trials: Iterable[Trial]) -> Ready:
    """Returns the best cache, called as the paired model has to be called."""
    ready, model = choose(case, trials), case.model
    if is_paired(model):
        ready.call = lambda **call: model(**{**call, "enable_temporal_attentions": False})
        ready.note += "; a spatial and a temporal block are one block"
    return ready


ROWS = (
    ("fewer steps", "the same sampler", run_fewer_steps),
    ("fewer steps, compiled", "the same under torch.compile", run_fewer_compiled),
    ("pabc skip eager", "Schedule.skip by its rule, backend='eager'", run_skip("eager")),
    ("pabc skip", "Schedule.skip by its rule, backend='inductor'", run_skip("inductor")),
    (
        "pabc skip, chosen",
        "Schedule.skip, TaylorSeer's best steps and rule",
        run_chosen_skip,
    ),
    ("TaylorSeer, equal calls", "lite mode, the best settings", run_taylorseer),
    ("MagCache, equal calls", "calibrated, the best settings", run_mag_cache),
    ("FirstBlockCache, equal calls", "threshold by bisection", run_first_block_cache),
)
"""Name, description and preparation of each variant that skips calls."""
