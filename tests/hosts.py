"""The host that the tests of the nodes for ComfyUI run in, and the loop that they compare with."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from small_host import SmallHost
from torch import Tensor

import pabc
from pabc.comfyui import NODE_CLASS_MAPPINGS
from pabc.comfyui.acceleration import Acceleration, find_acceleration


@cache
def find_host() -> Any:
    """Returns ComfyUI, where `PABC_COMFYUI` names its folder; else a small host of its form."""
    folder = os.environ.get("PABC_COMFYUI")
    if not folder:
        return SmallHost()
    from comfy_host import ComfyHost

    return ComfyHost(folder)


def accelerate(
    patcher: Any, speedup: float = 2.0, rule: str = "skip: linear", compile: str = "no"
) -> Any:
    (clone,) = NODE_CLASS_MAPPINGS["PabcAccelerate"]().accelerate(patcher, speedup, rule, compile)
    return clone


def acceleration_of(patcher: Any) -> Acceleration:
    found = find_acceleration(patcher)
    assert found is not None
    return found


def schedule_of(patcher: Any) -> pabc.Schedule:
    """Returns what the last run of a patcher followed."""
    report = acceleration_of(patcher).report
    assert report is not None and report.schedule is not None
    return report.schedule


class PlainLoop:
    """A forward in the place of a diffusion model's: makes the calls of the steps that a schedule
    computes, and forecasts the others from the outputs that it recorded, in one run."""

    def __init__(self, model: Any, schedule: pabc.Schedule) -> None:
        self.own, self.mask = model.forward, schedule.mask("model")
        self.sigmas, self.rule = schedule.timesteps, schedule.forecasts.get("model", "hold")
        self.kept: dict[Any, dict[int, Tensor]] = {}
        self.orders: Counter[Any] = Counter()
        self.step, self.num_computed = -1, 0
        model.forward = self

    def __call__(self, *args: Any, transformer_options: Mapping[str, Any], **kwargs: Any) -> Tensor:
        sigma = float(transformer_options["sigmas"].flatten()[0])
        step = max(0, sum(sigma <= level * (1 + 1e-5) for level in self.sigmas) - 1)
        if step != self.step:
            self.step = step
            self.orders.clear()
        batch = (*transformer_options["uuids"], *transformer_options["cond_or_uncond"])
        self.orders[batch] += 1
        order = self.orders[batch]
        if (batch, order) not in self.kept:  # as Heun's second calls, from the second step on
            first = self.kept.get((batch, order - 1), {})
            self.kept[batch, order] = {at: value for at, value in first.items() if at < step}
        kept = self.kept[batch, order]
        if self.mask[step] and kept:
            values = [kept[at] for at in sorted(kept, reverse=True)]
            weights = self.weigh(step, sorted(kept, reverse=True))
            return sum(w * x for w, x in zip(weights, values, strict=False))
        self.num_computed += 1
        result = self.own(*args, transformer_options=transformer_options, **kwargs)
        if not self.mask[step]:
            kept[step] = result.clone()
        return result

    def weigh(self, step: int, steps: Sequence[int]) -> Sequence[float]:
        """Returns the weights of what was recorded at these steps, the latest first."""
        if not isinstance(self.rule, str):
            return self.rule[step]
        order = {"hold": 1, "linear": 2, "quadratic": 3}[self.rule]
        points, weights = steps[:order], []
        for a in points:
            weight = 1.0
            for b in points:
                weight *= (step - b) / (a - b) if a != b else 1.0
            weights.append(weight)
        return weights
