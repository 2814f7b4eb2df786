"""The searched plans are the cheapest there are: every plan of a small generation is tried."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from vectors import draw_smooth, record_outputs

import pabc
from pabc.calibration.candidates import KINDS, Candidate, Kind
from pabc.calibration.fit import fit_weights
from pabc.calibration.growth import amplify_early
from pabc.calibration.paths import choose_gaps
from pabc.calibration.recording import Recording
from pabc.calibration.search import search
from pabc.calibration.updates import identify

SIMPLE = (
    *(kind for kind in KINDS if not kind.compensation),
    Kind("no growth", growth="none"),
    Kind("flat", cost="flat"),
    Kind("propagated", cost="propagated"),
    Kind("raw", is_guided=False),
    Kind("growth", growth="decay"),
)


@pytest.mark.parametrize("starts", [(0,), (0, 4), (0, 1, 5), (0, 7)])
@pytest.mark.parametrize("kind", SIMPLE, ids=lambda kind: kind.name)
def test_no_plan_is_cheaper(kind: Kind, starts: tuple[int, ...]) -> None:
    n, growth = 8, np.linspace(0.2, 1.5, 8)
    vectors = draw_smooth(n, seed=4)
    recording = record_outputs(vectors, starts=starts)
    found = search(recording, identify(recording), growth=growth, kinds=[kind])
    scale = {"none": np.ones(n), "early": amplify_early(n), "decay": growth**2}[kind.growth]
    for computed in range(len({*starts, n - 1}), n + 1):
        plan = found.best(computed)
        costs = {
            path: sum(
                scale[i] * rms(vectors, plan_weights, i, sources)
                for i, sources, plan_weights in skipped_steps(vectors, path, starts, kind)
            )
            for path in itertools.combinations(range(n), computed)
            if {*starts, n - 1} <= set(path)
        }
        assert costs[plan.computed] == pytest.approx(min(costs.values()), rel=1e-4, abs=1e-9)
        for i, _, weights in skipped_steps(vectors, plan.computed, starts, kind):
            np.testing.assert_allclose(plan.weights[i], weights, rtol=1e-6, atol=1e-9)


def skipped_steps(
    vectors: np.ndarray, path: tuple[int, ...], starts: tuple[int, ...], kind: Kind
) -> Iterator[tuple[int, list[int], np.ndarray]]:
    """Yields each skipped step, its sources, and their weights."""
    for i in sorted(set(range(len(vectors))) - set(path)):
        first = max(start for start in starts if start <= i)
        sources = [s for s in reversed(path) if first <= s < i][: kind.sources]
        weights, _ = fit_weights(
            vectors @ vectors.T,
            np.array(i),
            np.array(sources),
            is_fitted=kind.is_fitted,
        )
        yield i, sources, weights


def rms(vectors: np.ndarray, weights: np.ndarray, i: int, sources: list[int]) -> float:
    left = vectors[i] - weights @ vectors[sources]
    return float(np.sqrt(np.square(left).mean()))


@pytest.mark.parametrize("max_gap", [1, 2, 3])
def test_gaps_are_limited(max_gap: int) -> None:
    recording = record_outputs(draw_smooth(9))
    found = search(recording, identify(recording), max_gap=max_gap)
    fewest = 1 + -(-8 // max_gap)
    for computed in range(2, 10):
        plans = found.candidates(computed)
        assert bool(plans) == (computed >= fewest)
        assert all(np.diff(plan.computed).max() <= max_gap for plan in plans)


def test_plans_become_schedules() -> None:
    recording = record_outputs(draw_smooth(12))
    found = search(recording, identify(recording))
    plan = found.best(6)
    schedule = plan.schedule(recording.timesteps)
    assert isinstance(schedule, pabc.Schedule)
    assert schedule.timesteps == recording.timesteps
    assert [i for i, reused in enumerate(schedule.mask("model")) if not reused] == list(
        plan.computed
    )
    assert schedule.label == plan.name
    assert plan.schedule(recording.timesteps, "mine").label == "mine"
    rows = schedule.forecasts["model"]
    for i in set(range(12)) - set(plan.computed):
        assert rows[i] == plan.weights[i]
    with pytest.raises(ValueError, match="timesteps: expected 12, one per step, found 3"):
        plan.schedule((1.0, 2.0, 3.0))


def test_decibels_are_those_of_the_range() -> None:
    assert Candidate("any", (0,), ((),), error=0.01).decibels(2.0) == pytest.approx(46.0206)


def test_candidates_differ() -> None:
    recording = record_outputs(draw_smooth(16))
    found = search(recording, identify(recording))
    plans = found.candidates(7, limit=20)
    assert len({(plan.computed, plan.weights) for plan in plans}) == len(plans) > 3
    assert found.candidates(7, limit=2) == plans[:2]
    assert found.candidates(16) == [found.best(16)]
    assert found.best(16).error > 0


@pytest.mark.parametrize("kind", [*KINDS, *SIMPLE], ids=lambda kind: kind.name)
def test_predicted_errors_are_those_of_the_vectors(kind: Kind) -> None:
    """This sampler adds up outputs: the error of the result is the sum of those of forecasts."""
    n, starts = 12, (0, 5)
    vectors = draw_smooth(n)
    recording = record_outputs(vectors, starts=starts)
    found = search(recording, identify(recording), growth=np.ones(n), kinds=[kind])
    for computed in (5, 8):
        plan = found.best(computed)
        total = np.zeros(vectors.shape[1])
        for i in set(range(n)) - set(plan.computed):
            first = max(start for start in starts if start <= i)
            sources = [s for s in reversed(plan.computed) if first <= s < i]
            sources = sources[: kind.sources]
            assert len(sources) == len(plan.weights[i])
            scale = amplify_early(n)[i] if kind.growth == "early" else 1.0
            total += scale * (plan.weights[i] @ vectors[sources] - vectors[i])
        assert plan.error == pytest.approx(float(np.sqrt(np.square(total).mean())), rel=1e-3)


def test_each_ingredient_reduces_the_error() -> None:
    """Hold, weights, more of them, compensation: in this order, on a smooth generation."""
    recording = record_outputs(draw_smooth(30, elements=500))
    kinds = [
        Kind("hold", sources=1, is_fitted=False),
        Kind("2 weights", sources=2),
        Kind("3 weights", sources=3),
        Kind("3 weights, compensated", sources=3, compensation=1.0),
        Kind("6 weights, compensated", sources=6, compensation=1.0),
    ]
    updates = identify(recording)
    for computed in (10, 15):
        errors = [search(recording, updates, kinds=[kind]).best(computed).error for kind in kinds]
        assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 6])
@pytest.mark.parametrize("value", [0.0, 1.0, "random"])
def test_degenerate_generations_have_sane_plans(num_steps: int, value: Any) -> None:
    random = np.random.default_rng(0)
    if value == "random":
        outputs = random.normal(size=(num_steps, 7))
    else:
        outputs = np.full((num_steps, 7), value)
    recording = record_outputs(outputs)
    found = search(recording, identify(recording), growth=np.ones(num_steps))
    for computed in range(min(2, num_steps), num_steps + 1):
        for plan in found.candidates(computed):
            assert len(plan.computed) == computed
            assert {0, num_steps - 1} <= set(plan.computed)
            assert np.isfinite(plan.error) and plan.error > 0
            assert all(np.isfinite(row).all() for row in plan.weights)
            assert max(np.abs([*row, 0.0]).max() for row in plan.weights) < 100
            assert [i for i, row in enumerate(plan.weights) if not row] == list(plan.computed)


def test_a_hundred_steps_are_searched_in_seconds() -> None:
    """So that no kind takes a path that grows with the fourth power of the steps."""
    recording = record_outputs(draw_smooth(100))
    updates = identify(recording)
    assert len(choose_gaps(100, 16)) < 16
    begin = time.process_time()
    found = search(recording, updates)
    assert time.process_time() - begin < 120
    for computed in (2, 5, 20, 60, 100):
        assert len(found.best(computed).computed) == computed


def test_where_the_sampler_is_unknown_all_steps_cost_the_same() -> None:
    recording = record_outputs(draw_smooth(9))
    updates = identify(recording)
    odd = replace(updates, outputs=updates.outputs * np.arange(1, 10)[:, None, None] ** 2)
    known = search(recording, odd, kinds=[Kind("a")]).best(5)
    unknown = replace(odd, residual=np.ones(9))
    flat = search(recording, unknown, kinds=[Kind("a")]).best(5)
    assert flat.computed == search(recording, odd, kinds=[Kind("a", cost="flat")]).best(5).computed
    assert known.computed != flat.computed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"growth": np.ones(3)}, "growth: expected 8 finite numbers"),
        ({"growth": np.full(8, np.nan)}, "growth: expected 8 finite numbers"),
        ({"max_gap": 0}, "max_gap: expected a positive number, found 0"),
        ({"kinds": []}, "kinds: expected at least one, found none"),
    ],
)
def test_bad_values_are_refused(settings: dict[str, Any], message: str) -> None:
    recording = record_outputs(draw_smooth(8))
    with pytest.raises(ValueError, match=message):
        search(recording, identify(recording), **settings)


def test_updates_of_another_generation_are_refused() -> None:
    recording, other = (record_outputs(draw_smooth(n)) for n in (8, 9))
    with pytest.raises(ValueError, match="updates: expected those of 8 steps, found 9"):
        search(recording, identify(other))


@pytest.mark.parametrize("computed", [0, 1, 9, 2.5, True])
def test_impossible_numbers_are_refused(computed: Any) -> None:
    recording: Recording = record_outputs(draw_smooth(8))
    found = search(recording, identify(recording))
    with pytest.raises(ValueError, match="computed: expected"):
        found.candidates(computed)
