"""Forecasts that make up for the errors of those before, and where steps are computed then."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from vectors import draw_smooth

from pabc.calibration import fit
from pabc.calibration.compensation import Outputs, compensate, find_histories, predict
from pabc.calibration.refinement import refine

EFFECTS = np.array([0.5, 1.0, 2.0, 1.0, 1.0, -1.0, 1.0, 0.3, 1.0, 1.0])


def smooth_outputs(num_steps: int = 10, seed: int = 0) -> tuple[np.ndarray, Outputs]:
    vectors = draw_smooth(num_steps, seed=seed)
    return vectors, Outputs(vectors @ vectors.T, np.ones((num_steps, 1)))


def as_mask(*plans: tuple[int, ...], num_steps: int = 10) -> np.ndarray:
    return np.array([[step in plan for step in range(num_steps)] for plan in plans])


def test_weights_are_least_squares_of_all_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the vectors themselves: each forecast is fitted to its output less the error so far."""
    monkeypatch.setattr(fit, "RIDGE", 0.0)
    vectors, outputs = smooth_outputs()
    plans = [(0, 1, 3, 5, 7, 9), (0, 2, 3, 4, 8, 9), (0, 9)]
    weights, norms = compensate(outputs, as_mask(*plans), EFFECTS, sources=3)
    for row, plan in enumerate(plans):
        error = np.zeros(vectors.shape[1])
        for step in range(10):
            if step not in plan:
                sources = [s for s in reversed(plan) if s < step][:3]
                wanted = vectors[step] - error / EFFECTS[step]
                best = np.linalg.lstsq(vectors[sources].T, wanted, rcond=None)[0]
                np.testing.assert_allclose(
                    weights[row, step, : len(sources)], best, rtol=1e-4, atol=1e-5
                )
                error += EFFECTS[step] * (best @ vectors[sources] - vectors[step])
            assert norms[row, step] == pytest.approx(float(np.linalg.norm(error)), rel=1e-4)


def test_less_is_left_than_without() -> None:
    _, outputs = smooth_outputs(40)
    computed = as_mask(tuple(range(0, 40, 2)) + (39,), num_steps=40)
    effects = np.ones(40)
    weights, norms = compensate(outputs, computed, effects, sources=3)
    histories = find_histories(computed, (0,), 3)
    plain = np.zeros(weights.shape)
    for step in np.flatnonzero(~computed[0]):
        plain[0, step], _ = fit.fit_weights(outputs.gram, np.array(step), histories[0, step])
    assert norms[0, -1] < 0.5 * predict(outputs, computed, plain, effects)[0]


def test_two_branches_are_guided_as_one() -> None:
    """Branches with changing shares: as their guided sums, which here are the same vectors."""
    vectors, single = smooth_outputs()
    other = draw_smooth(10, seed=7)
    scale = np.linspace(1.0, 4.0, 10)
    shares = np.stack([scale, 1 - scale], 1)
    stacked = np.concatenate([vectors, other])
    outputs = Outputs(stacked @ stacked.T, shares)
    computed = as_mask((0, 2, 4, 6, 9))
    weights, norms = compensate(outputs, computed, EFFECTS, sources=2)
    error = np.zeros(vectors.shape[1])
    for step in (1, 3, 5, 7, 8):
        guided = shares[step, 0] * vectors + shares[step, 1] * other
        sources = [s for s in (6, 4, 2, 0) if s < step][:2]
        used = weights[0, step, : len(sources)]
        error += EFFECTS[step] * (used @ guided[sources] - guided[step])
        assert norms[0, step] == pytest.approx(float(np.linalg.norm(error)), rel=1e-6)
    same = np.repeat([[2.0, -1.0]], 10, 0)
    again, _ = compensate(
        Outputs(np.kron(np.ones((2, 2)), single.gram), same), computed, EFFECTS, sources=2
    )
    np.testing.assert_allclose(
        again, compensate(single, computed, EFFECTS, sources=2)[0], rtol=1e-6, atol=1e-9
    )


def test_histories_end_where_another_model_begins() -> None:
    found = find_histories(as_mask((0, 1, 4, 5, 7), num_steps=9), (0, 5), 2)[0]
    expected = [[-1, -1], [0, -1], [1, 0], [1, 0], [1, 0], [-1, -1], [5, -1], [5, -1], [7, 5]]
    assert found.tolist() == expected


def test_steps_without_an_effect_are_forecast_as_they_are() -> None:
    _, outputs = smooth_outputs()
    effects = EFFECTS * (np.arange(10) != 6)
    weights, norms = compensate(outputs, as_mask((0, 1, 3, 5, 9)), effects, sources=3)
    assert np.isfinite(weights).all() and np.isfinite(norms).all()
    plain, _ = fit.fit_weights(outputs.gram, np.array(6), np.array((5, 3, 1)))
    np.testing.assert_allclose(weights[0, 6], plain)
    zero, norms = compensate(outputs, as_mask((0, 5, 9)), np.zeros(10), sources=3)
    assert np.isfinite(zero).all() and not norms.any()


@pytest.mark.parametrize("starts", [(0,), (0, 3)])
@pytest.mark.parametrize("computed", [4, 5, 6])
def test_refined_steps_are_near_the_best_there_are(computed: int, starts: tuple[int, ...]) -> None:
    _, outputs = smooth_outputs(9, seed=3)
    effects = np.ones(9)
    fixed = {*starts, 8}
    plans = [p for p in itertools.combinations(range(9), computed) if fixed <= set(p)]
    _, norms = compensate(outputs, as_mask(*plans, num_steps=9), effects, sources=3, starts=starts)
    errors = dict(zip(plans, np.sqrt(norms[:, -1] ** 2 + np.square(norms).mean(1)), strict=True))
    ranked = sorted(plans, key=errors.__getitem__)
    for begin in (ranked[-1], plans[0]):
        found = refine(outputs, begin, effects, sources=3, starts=starts)
        assert fixed <= set(found) and len(found) == computed
        assert ranked.index(found) <= len(ranked) // 8
    assert refine(outputs, ranked[0], effects, sources=3, starts=starts) == ranked[0]
