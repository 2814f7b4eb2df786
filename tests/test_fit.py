"""Weights of forecasts and their errors, against least squares on the vectors themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vectors import draw_smooth

from pabc.calibration import fit
from pabc.calibration.fit import fit_weights

SOURCES = [(5,), (5, 3), (5, 4, 1), (5, 3, 2), (7, 6, 0)]


@pytest.mark.parametrize("sources", SOURCES)
@pytest.mark.parametrize("target", [8, 10])
def test_weights_are_those_of_least_squares(
    sources: tuple[int, ...], target: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "RIDGE", 0.0)
    vectors = draw_smooth(11)
    weights, error = fit_weights(vectors @ vectors.T, np.array(target), np.array(sources))
    columns = torch.as_tensor(vectors[list(sources)].T)
    expected = torch.linalg.lstsq(columns, torch.as_tensor(vectors[target])[:, None]).solution
    np.testing.assert_allclose(weights, expected[:, 0], rtol=1e-5, atol=1e-6)
    left = vectors[target] - weights @ vectors[list(sources)]
    assert float(error) == pytest.approx(float(left @ left), rel=1e-6)


@pytest.mark.parametrize("sources", SOURCES)
def test_a_little_ridge_changes_the_error_little(sources: tuple[int, ...]) -> None:
    vectors = draw_smooth(11)
    gram = vectors @ vectors.T
    weights, error = fit_weights(gram, np.array(9), np.array(sources))
    left = vectors[9] - weights @ vectors[list(sources)]
    assert float(error) == pytest.approx(float(left @ left), rel=1e-6)
    best = np.linalg.lstsq(vectors[list(sources)].T, vectors[9], rcond=None)[1]
    assert float(error) <= float(best[0]) * 1.1 + 1e-6 * float(gram[9, 9])


def test_polynomials_are_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sources of a parabola: the weights are Lagrange's."""
    monkeypatch.setattr(fit, "RIDGE", 1e-9)
    times = np.arange(9.0)[:, None]
    vectors = np.concatenate([times**0, times, times**2], 1) @ np.random.default_rng(0).normal(
        size=(3, 50)
    )
    weights, error = fit_weights(vectors @ vectors.T, np.array(8), np.array((6, 4, 3)))
    np.testing.assert_allclose(weights, [10 / 3, -5.0, 8 / 3], rtol=1e-2)
    assert error < 1e-5 * (vectors[8] @ vectors[8])


def test_all_targets_at_once_are_as_one_by_one() -> None:
    vectors = draw_smooth(9)
    gram = vectors @ vectors.T
    targets, sources = np.array([6, 7, 8]), np.array([(5, 4, 2), (5, 3, 2), (6, -1, -1)])
    weights, errors = fit_weights(gram, targets, sources)
    for row in range(3):
        one, error = fit_weights(gram, targets[row], sources[row])
        np.testing.assert_allclose(weights[row], one)
        assert errors[row] == pytest.approx(float(error))
    assert not weights[2, 1:].any()
    short, _ = fit_weights(gram, np.array(8), np.array((6,)))
    np.testing.assert_allclose(weights[2, :1], short)


def test_a_gram_per_target_is_used() -> None:
    vectors = [draw_smooth(6, seed=seed) for seed in range(6)]
    grams = np.stack([each @ each.T for each in vectors])
    targets, sources = np.array([4, 5]), np.array([(3, 2), (3, 2)])
    weights, _ = fit_weights(grams, targets, sources)
    for row, target in enumerate(targets):
        one, _ = fit_weights(grams[target], targets[row], sources[row])
        np.testing.assert_allclose(weights[row], one)


def test_hold_takes_the_newest_source() -> None:
    vectors = draw_smooth(6)
    weights, error = fit_weights(
        vectors @ vectors.T, np.array(4), np.array((2, 1)), is_fitted=False
    )
    assert weights.tolist() == [1.0, 0.0]
    assert float(error) == pytest.approx(float(((vectors[4] - vectors[2]) ** 2).sum()))


@pytest.mark.parametrize("vectors", [np.zeros((6, 5)), np.ones((6, 5)), np.ones((6, 1))])
def test_dependent_outputs_are_held(vectors: np.ndarray) -> None:
    gram = vectors @ vectors.T
    weights, error = fit_weights(gram, np.array(5), np.array((3, 2, 0)))
    assert np.isfinite(weights).all()
    assert error <= 0.0
    np.testing.assert_allclose(weights, [1.0, 0.0, 0.0], atol=1e-12)
