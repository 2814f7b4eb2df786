"""Reuse against a cache written by hand: masks, their schedule, and the comparison."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping

import torch
from models import Case, Point, run_by_hand
from torch import nn

import pabc
from pabc import Schedule

STEPS = 6


def make_masks(model, *, seed):
    """Draws a mask for each region that the points of a model mark."""
    rng = random.Random(seed)
    counts = Counter(
        (p.kind, p.num_points)
        for p in model.modules()
        if isinstance(p, Point) and "branch" in p.cuts
    )
    return {
        (kind, layer): (False, *(rng.random() < 0.5 for _ in range(STEPS - 1)))
        for (kind, num_points), count in counts.items()
        for layer in range(count // num_points)
        if kind != "other"
    }


def make_schedule(masks):
    schedule = Schedule.none(range(STEPS, 0, -1))
    for (kind, layer), mask in masks.items():
        schedule = schedule.override(kind=kind, layers=layer, mask=mask)
    return schedule


def compare_with_hand(
    model: nn.Module, case: Case, kinds: Mapping[str, str] | None = None
) -> pabc.Explanation:
    """Checks a compiled model, bit for bit: without reuse against the model itself, with reuse
    against a cache written by hand. Returns the explanation.
    """
    calls = [case.call(step) for step in range(5)]
    found = pabc.explain(model, kinds=kinds, **calls[0])
    reused = sorted(set(found.attention.values()) - {"other"})
    none = pabc.compile(model, pabc.Schedule.none(range(5)), backend="eager", kinds=kinds)
    mask = [False, True, True, False, True]
    schedule = pabc.Schedule.from_masks(range(5), dict.fromkeys(reused, mask))
    fast = pabc.compile(model, schedule, backend="eager", kinds=kinds)
    masks = {(kind, layer): mask for kind in reused for layer in range(9)}
    expected = run_by_hand(model, calls, masks, "attention")
    with torch.no_grad():
        for call, reference in zip(calls, expected, strict=True):
            assert torch.equal(none(**call), model(**call))
            assert torch.equal(fast(**call), reference)
    assert not torch.equal(expected[1], none(**calls[1])), "nothing was reused"
    return found
