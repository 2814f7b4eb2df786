"""A small denoiser, and loops around it as people write them: flow Euler, with guidance or not; and
`pabc.auto` for these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import pabc
from pabc import Schedule


class Denoiser(nn.Module):
    """A velocity that bends with the timestep; `calls` counts its calls."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.mix, self.read = nn.Linear(4, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        bent = torch.sin(3 * timestep / 1000)[:, None, None]
        return torch.tanh(self.mix(x) * (1 + bent) + self.read(text)[:, None]) - x / 2


def make_denoiser(seed: int = 0) -> nn.Module:
    return Denoiser(seed).eval().requires_grad_(False)


@dataclass(frozen=True)
class Loop:
    """A user's loop.

    `form`: of its calls: "one", without guidance; "batched", both branches as one call; "named",
    two calls with names; "unnamed", two without.
    """

    form: str = "one"
    num_steps: int = 12
    guidance: float = 3.0
    order: int = 1
    clips: int = 2
    dtype: torch.dtype = torch.float32

    def __call__(self, model: Callable[..., Tensor], seed: int) -> Tensor:
        """Returns the result; `order` 2 is Adams-Bashforth's multistep method."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.clips, 6, 4, generator=generator).to(self.dtype)
        text = torch.randn(self.clips, 3, generator=generator).to(self.dtype)
        sigmas = torch.linspace(1, 0, self.num_steps + 1).to(self.dtype)
        last = None
        for now, after in pairwise(sigmas):
            guided = self.guide(model, x, (1000 * now).expand(self.clips), text)
            mixed = guided if last is None or self.order == 1 else 1.5 * guided - 0.5 * last
            x = x + (after - now) * mixed
            last = guided
        return x

    def guide(self, model: Any, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        if self.form == "one":
            return model(x, t, text=text)
        empty = torch.zeros_like(text)
        if self.form == "batched":
            both = model(torch.cat([x, x]), torch.cat([t, t]), text=torch.cat([empty, text]))
            uncond, cond = both.chunk(2)
        else:
            name = getattr(model, "cache_context", lambda _: nullcontext())
            name = name if self.form == "named" else lambda _: nullcontext()
            with name("uncond"):
                uncond = model(x, t, text=empty)
            with name("cond"):
                cond = model(x, t, text=text)
        return uncond + self.guidance * (cond - uncond)

    def by_hand(self, model: nn.Module, seed: int, schedule: Schedule) -> Tensor:
        """Runs the loop with the model called at the computed steps alone."""
        return self(Forecasts(model, schedule, 2 if self.form in ("named", "unnamed") else 1), seed)

    def but(self, **changes: Any) -> Loop:
        """Returns this loop with changes."""
        return replace(self, **changes)


class Forecasts:
    """A model that a plan of whole calls is followed for, by hand: `branches` calls a step."""

    def __init__(self, model: nn.Module, schedule: Schedule, branches: int) -> None:
        self.model, self.branches, self.count = model, branches, 0
        self.mask, self.rows = schedule.mask("model"), schedule.forecasts["model"]
        self.kept: list[list[Tensor]] = [[] for _ in range(branches)]

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        step, branch = divmod(self.count, self.branches)
        self.count += 1
        kept = self.kept[branch]
        if not self.mask[step]:
            kept.insert(0, self.model(*args, **kwargs))
            return kept[0]
        return weigh(kept, self.rows[step])


def weigh(kept: Sequence[Tensor], row: Any) -> Tensor:
    """Returns the weighted sum of outputs, the newest first."""
    assert not isinstance(row, str)
    total = torch.zeros_like(kept[0])
    for weight, value in zip(row, kept, strict=False):
        total = total + weight * value
    return total


def compile_auto(model: nn.Module, cache: Any = False, **options: Any) -> Any:
    asked = {} if options.keys() & {"speedup", "psnr"} else {"calls": 7, "floor": 5.0}
    backend = options.pop("backend", "original")
    return pabc.compile(model, pabc.auto(**{**asked, **options}, cache=cache), backend=backend)


def run(fast: Any, loop: Loop, seed: int) -> tuple[Tensor, pabc.Stats]:
    """Runs a generation; returns its result, and what was counted before and after."""
    with torch.no_grad():
        result = loop(fast, seed)
    return result, fast.stats


def plan_of(fast: Any) -> pabc.Schedule:
    """Returns the schedule of the last generation."""
    return fast.current.schedule
