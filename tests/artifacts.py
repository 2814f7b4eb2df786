"""Compiled models of which artifacts are saved: cases, a schedule of a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models import CASES
from reading import generate
from torch import nn

import pabc

BY_NAME = {case.name: case for case in CASES}
NUM_STEPS = 4
STEPS = range(NUM_STEPS, 0, -1)
SCHEDULE = pabc.Schedule.pyramid(STEPS, full=2, spatial=2, temporal=4, cross=2, joint=2)


def saved(model: nn.Module, calls: list[Any], path: Path, **options: Any) -> pabc.CompiledModel:
    fast = pabc.compile(model, SCHEDULE, **{"backend": "eager", **options})
    generate(fast, calls)
    fast.save(path)
    return fast
