"""Models with state beside their tensors, and how they are saved and loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import pabc

STEPS = [900.0, 500.0, 100.0]
FACTOR = 1.5
TABLE = {"factor": 1.5}


class Mode(Enum):
    SLOW = 1
    FAST = 2


@dataclass
class Config:
    scale: float = 1.0
    modes: frozenset[Mode] = frozenset(Mode)
    _bias: float = field(default=0.0, compare=False, repr=False)
    _note: str = field(default="", compare=False, repr=False)


class Holder:
    def __init__(self) -> None:
        self.scale = 1.0
        self._scale = 1.0


def scaled(x: Any, by: float) -> Any:
    return x * by


def by_global(x: Any) -> Any:
    return x * FACTOR * TABLE["factor"]


def biased(x: Any, config: Config) -> Any:
    return x + config._bias


class Adapted(nn.Module):
    factor = 1.5
    factors = (1.5,)

    def __init__(self) -> None:
        super().__init__()
        self.base, self.up = nn.Linear(4, 4), nn.Linear(4, 4)
        self.enabled, self._scale, self.mode = True, 1.0, Mode.SLOW

    def set_adapter(self, enabled: bool, scale: float = 1.0, mode: Mode = Mode.SLOW) -> None:
        self.enabled, self._scale, self.mode = enabled, scale, mode

    def forward(self, x: Any) -> Any:
        if not self.enabled or self.mode is Mode.FAST:
            return self.base(x)
        return self.base(x) * self.factor * self.factors[0] + self._scale * self.up(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.adapted, self.head, self.other = Adapted(), nn.Linear(4, 4), nn.Linear(4, 4)
        self.config, self.held, self.names = Config(), (Holder(), [Holder()], Holder()), {"a"}
        self.array, self.tensors = np.ones(2), [torch.ones(4)]
        self.part = partial(scaled, by=1.5)
        self.close_over(1.0)
        self.active = self.held[2]

    def close_over(self, scale: float) -> None:
        own, config = self.other, {"scale": scale}
        self.__dict__["call_other"] = lambda x: own(x) * config["scale"]

    def forward(self, x: Any, t: Any) -> Any:
        y = self.head(self.adapted(x)) * self.config.scale + float(self.array[0])
        y = y * self.active.scale
        y = y * self.held[0]._scale * self.held[1][0].scale + ("b" in self.names)
        return (
            self.call_other(self.part(by_global(biased(y, self.config))) * self.tensors[0])
            * (t / 1000)[:, None]
        )


def generate(model: Any) -> list[Any]:
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [model(x, torch.full((2,), t)) for t in STEPS]


def save(model: nn.Module, path: Path) -> Path:
    fast = pabc.compile(model, pabc.Schedule.none(STEPS), backend="eager")
    generate(fast)
    fast.save(path)
    return path


def check_loads(path: Path, model: nn.Module) -> None:
    expected = generate(model)
    loaded = pabc.load(path, model)
    assert all(map(torch.equal, generate(loaded), expected))
    assert loaded.stats.captures == 0


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Any) -> Any:
        self.calls += 1
        return x


class Noting(Model):
    """Counts its calls, builds a table at the first one, and has notes that differ each time."""

    def __init__(self) -> None:
        super().__init__()
        self.counter, self.memo, self.tables = Counter(), None, {}
        self.held[0].address, self.config._note = id(self), f"made as {object()!r} by {id(self)}"

    @cached_property
    def size(self) -> int:
        return 4

    def forward(self, x: Any, t: Any) -> Any:
        if self.memo is None:
            self.memo = (torch.ones(self.size),)
        if x.shape not in self.tables:
            self.tables[x.shape] = torch.ones(4)
        return super().forward(x, self.counter(t)) * self.memo[0] * self.tables[x.shape]
