"""Sharded generations, by name: which model, how it is divided, what is asked of pabc besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from models import MODELS

import pabc
from pabc.plan import Plan

from .subjects import RECORDED

NUM_STEPS = 6
STEPS = tuple(900.0 - 100 * step for step in range(NUM_STEPS))
RANGES = {"spatial": 2, "temporal": 3, "cross": 5, "full": 2, "joint": 3}
PYRAMID = pabc.Schedule.pyramid(STEPS, **RANGES)
"""Kinds are reused at different steps; the last step but one reuses all of them but cross."""
ALL_OR_NOTHING = pabc.Schedule.pyramid(STEPS, **dict.fromkeys(RANGES, 3))
"""Two phases, to compile few."""
NONE = pabc.Schedule.none(STEPS)
SKIP = pabc.Schedule.skip(STEPS, 3)
NESTED = pabc.Schedule.from_masks(
    STEPS,
    {
        kind: [symbol == "." for symbol in row]
        for kind, row in {
            "mlp": "##.#.#",
            "block": "##..##",
            "stack": "##.#.#",
            "model": "###.#.",
        }.items()
    },
    forecast={"block": "linear", "stack": "quadratic", "model": "linear"},
)
"""Steps 2 to 5 reuse the stack, the model (and what it covers), the stack, the model."""


@dataclass(frozen=True, kw_only=True)
class RankCase:
    """One or more generations on so many ranks.

    Attributes:
        subject: the model's name, see `subjects.py`.
        batch: samples of a call.
        schedules: one per generation, set between them.
        branches: how many calls a step makes, each in a cache context of its own.
        batch_ranks: the first size of a mesh of two dimensions.
        options: of :func:`pabc.compile`.
        ranks: the numbers of processes that it is run on.
    """

    name: str
    subject: str
    batch: int = 2
    schedules: tuple[pabc.Schedule, ...] = (PYRAMID,)
    branches: int = 1
    batch_ranks: int | None = None
    backend: str = "eager"
    options: Mapping[str, Any] = field(default_factory=dict)
    ranks: tuple[int, ...] = (2, 3, 4)

    def __str__(self) -> str:
        return self.name

    @property
    def one_rank_options(self) -> tuple[str, ...]:
        """Those of its options that say something of one rank."""
        return tuple(name for name in self.options if name in ("cache_dtype", "cut"))

    @property
    def reference(self) -> tuple[Any, ...]:
        """What one rank is asked for: cases that have the same share it."""
        options = tuple((name, self.options[name]) for name in self.one_rank_options)
        budget = self.options.get("memory_budget")
        return self.subject, self.batch, self.schedules, self.branches, options, budget

    @property
    def follows_plans(self) -> bool:
        """Returns whether one rank follows the plans of the ranks, which a budget decides."""
        return "memory_budget" in self.options

    def follow(self, plans: Sequence[Plan]) -> RankCase:
        """The same with schedules that say of each region what its plan says."""
        return replace(self, schedules=tuple(map(_follow, plans)))


def _follow(plan: Plan) -> pabc.Schedule:
    schedule = pabc.Schedule.none(plan.timesteps)
    for slot, mask in zip(plan.slots, plan.reuse.T, strict=True):
        schedule = schedule.override(kind=slot.kind, layers=slot.layer, mask=mask.tolist())
    return schedule


TOKEN_DIMS = {"latte": (2, 3, 4), "opensora": (2, 3, 4), "cogvideox": (1, 3, 4)}
"""Of the latents: T, H, W."""


def _make_cases() -> list[RankCase]:
    cases = []
    for name, dims in TOKEN_DIMS.items():
        cases.append(RankCase(name=name, subject=name))
        cases.append(RankCase(name=f"{name}-none", subject=name, schedules=(NONE,), ranks=(3,)))
        cases += [
            RankCase(name=f"{name}-shard{dim}", subject=name, options={"shard": dim}, ranks=ranks)
            for dim, ranks in zip(dims, ((2,), (3, 4), (2, 4)), strict=True)
        ]
        cases += [
            RankCase(
                name=f"{name}-output-shard{dim}",
                subject=name,
                options={"shard": dim, "output": "sharded"},
                ranks=ranks,
            )
            for dim, ranks in ((dims[0], (2,)), (dims[1], (3,)))
        ]
        cases.append(RankCase(name=f"{name}-skip", subject=name, schedules=(SKIP,), ranks=(2,)))
        cases.append(
            RankCase(name=f"{name}-nested", subject=name, schedules=(NESTED,), ranks=(2, 3))
        )
        cases.append(RankCase(name=f"{name}-2x2", subject=name, batch_ranks=2, ranks=(4,)))
        cases.append(
            RankCase(
                name=f"{name}-inductor",
                subject=f"{name}, shallow",
                schedules=(ALL_OR_NOTHING,),
                backend="inductor",
                ranks=(2,),
            )
        )
    return cases


CASES: tuple[RankCase, ...] = (
    *_make_cases(),
    *(RankCase(name=name, subject=name, ranks=(2, 3)) for name in RECORDED),
    RankCase(name="batch3-on-2", subject="opensora", batch=3, batch_ranks=2, ranks=(2,)),
    RankCase(name="batch2-on-3", subject="cogvideox", batch_ranks=3, ranks=(3,)),
    RankCase(name="batch3-on-2x2", subject="opensora", batch=3, batch_ranks=2, ranks=(4,)),
    RankCase(
        name="batch3-on-2x2-output",
        subject="latte",
        batch=3,
        batch_ranks=2,
        options={"output": "sharded"},
        ranks=(4,),
    ),
    RankCase(name="two-branches", subject="latte", branches=2, ranks=(2,)),
    RankCase(
        name="other-schedule",
        subject="opensora",
        schedules=(PYRAMID, NONE, pabc.Schedule.pyramid(STEPS, temporal=2, cross=3)),
        ranks=(3,),
    ),
    RankCase(name="bf16", subject="latte", options={"cache_dtype": "bf16"}, ranks=(2,)),
    RankCase(name="fp8", subject="latte", options={"cache_dtype": "fp8"}, ranks=(3,)),
    RankCase(name="budget", subject="latte", options={"memory_budget": 12000}, ranks=(3,)),
    RankCase(name="branch-cut", subject="opensora", options={"cut": "branch"}, ranks=(3,)),
    RankCase(name="HunyuanVideo", subject="HunyuanVideo", ranks=(2, 3)),
    RankCase(name="LTX", subject="LTX", ranks=(4,)),
    *(RankCase(name=case.name, subject=case.name, ranks=(3,)) for case in MODELS),
)

NUM_RANKS = sorted({num_ranks for case in CASES for num_ranks in case.ranks})
