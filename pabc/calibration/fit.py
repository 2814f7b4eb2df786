"""Fit: the least-squares weights of a forecast, and its error, from inner products alone."""

from __future__ import annotations

import numpy as np

RIDGE = 1e-5
"""Relative to the squared norm of each regressor: the prior is to hold the last output."""
NULL = 1e-13
"""A regressor with a smaller square, relative to its sources', is what rounding left of 0."""


def fit_weights(
    gram: np.ndarray,
    target: np.ndarray,
    sources: np.ndarray,
    *,
    is_fitted: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns weights [..., k] and squared errors [...] of forecasts of outputs from others.

    The regressors are the newest source and the divided differences of the sources: the weights
    continue a polynomial, stretched as fits best. What the data leaves open holds the last output.

    Args:
        gram: [..., n, n] inner products of outputs; one for all forecasts, or one per target step
            [n, n, n].
        target: [...] the steps that are forecast.
        sources: [..., k] the steps that they are forecast from, the newest first; -1 for none.
        is_fitted: False: the newest source is held.
    """
    target, sources = np.asarray(target), np.asarray(sources)
    known = sources >= 0
    steps = np.concatenate([target[..., None], np.where(known, sources, target[..., None])], -1)
    products = _gather(gram, target, steps)
    if not is_fitted:
        weights = np.zeros(sources.shape)
        weights[..., 0] = 1.0
        return weights, _error(products, weights)
    weights = solve_weights(products[..., 1:, 1:], products[..., 1:, 0], sources)
    return weights, _error(products, weights)


def solve_weights(inner: np.ndarray, cross: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """Returns the weights [..., k] of sources in the sum that is nearest to a wanted vector.

    Args:
        inner: [..., k, k] inner products of the sources.
        cross: [..., k] inner products of the sources with the wanted vector.
        sources: [..., k] their steps, the newest first; -1 for none, whose products do not count.
    """
    known = sources >= 0
    basis = _build_basis(sources, known)
    # What is wanted less the newest source: what is to be added to holding it.
    found = np.einsum("...ra,...a->...r", basis, cross - inner[..., :, 0])
    regular = basis @ inner @ np.swapaxes(basis, -1, -2)
    diagonal = np.einsum("...rr->...r", regular)
    squares = np.einsum("...ra,...a->...r", basis**2, np.einsum("...aa->...a", inner))
    kept = diagonal > NULL * squares
    regular = regular * (kept[..., :, None] & kept[..., None, :])
    found, basis = found * kept, basis * kept[..., None]
    np.einsum("...rr->...r", regular)[...] *= 1.0 + RIDGE
    weights = np.einsum("...r,...ra->...a", _solve(regular, found), basis)
    weights[..., 0] += 1.0
    return weights


def _gather(gram: np.ndarray, target: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Returns the inner products of some steps, [..., s, s]."""
    rows, columns = steps[..., :, None], steps[..., None, :]
    if gram.ndim == 2:
        return gram[rows, columns]
    return gram[target[..., None, None], rows, columns]


def _build_basis(sources: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Returns the regressors as sums of sources, [..., k, k]; those that lack a source are 0.

    Regressor r is the divided difference of the sources 0 to r, in which source p has the weight
    1 / product over the other sources q up to r of (step of p - step of q).
    """
    gaps = (sources[..., :, None] - sources[..., None, :]).astype(np.float64)
    gaps[gaps == 0] = 1.0
    weights = np.swapaxes(1.0 / np.cumprod(gaps, -1), -1, -2)
    return np.tril(weights) * known[..., None]


def _solve(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Returns the solutions of small positive definite systems, [..., k].

    Where a row is 0, so is the solution.
    """
    diagonal = np.einsum("...rr->...r", matrix)
    scale = np.divide(1.0, np.sqrt(diagonal), out=np.zeros_like(vector), where=diagonal > 0)
    scaled = matrix * (scale[..., :, None] * scale[..., None, :])
    np.einsum("...rr->...r", scaled)[...] = 1.0
    return np.linalg.solve(scaled, (vector * scale)[..., None])[..., 0] * scale


def _error(products: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the squared norms of the targets less the weighted sums of their sources.

    Weights are applied to differences from the target as far as they add up to 1, so that nearly
    equal outputs leave no rounding error.
    """
    square = products[..., :1, :1]
    shifted = products[..., 1:, 1:] - products[..., 1:, :1] - products[..., :1, 1:] + square
    cross = products[..., 1:, 0] - square[..., 0]
    rest = 1.0 - weights.sum(-1)
    errors = np.einsum("...a,...ab,...b->...", weights, shifted, weights)
    errors = errors - 2 * rest * np.einsum("...a,...a->...", weights, cross)
    return np.maximum(errors + rest**2 * square[..., 0, 0], 0.0)
