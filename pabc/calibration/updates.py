"""Updates: what the sampler makes of outputs, identified from a recorded generation.

A sampler without noise makes the next latents from those it has and from outputs:

    x_{i+1} = sum over l of inputs[i, l] x_{i-l} + sum over b and l of outputs[i, b, l] o_{b, i-l}

The coefficients follow from inner products alone, so no sampler has to be known by name, and
nothing is read from its configuration. Single-step samplers (DDIM, Euler) need no lag l > 0;
multistep ones (DPM-Solver++ 2M, UniPC) and those that call the model twice a step (Heun) do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pabc.calibration.recording import Recording

EXACT = 1e-4
"""A relative residual that rounding to float32 may leave."""
COMMON = 0.9
"""The share of transitions that have to be exact for lags to be taken."""
NULL = 1e-12
"""Directions with a smaller eigenvalue are taken for dependent on the others."""
SAME = 2.0
"""Shares of branches that are those of other transitions may increase the residual so much."""
CLEAR = 0.5
"""The relative residual up to which a transition tells how the branches are guided."""


@dataclass(frozen=True)
class Updates:
    """The coefficients of a sampler of n steps and m branches.

    Attributes:
        inputs: [n, lags] of the inputs x_i, x_{i-1}, ... in x_{i+1}.
        outputs: [n, m, lags] of the outputs o_{b, i}, o_{b, i-1}, ... in x_{i+1}.
        residual: [n] the root mean square of what is left over, relative to that of x_{i+1} - x_i.
            Where it is large, the sampler is not linear (thresholding, rescaled guidance) or adds
            noise.
    """

    inputs: np.ndarray
    outputs: np.ndarray
    residual: np.ndarray

    @property
    def num_steps(self) -> int:
        """The number of steps."""
        return len(self.residual)

    @property
    def own(self) -> np.ndarray:
        """The coefficients of x_i in x_{i+1}, [n]."""
        return self.inputs[:, 0]

    @property
    def direct(self) -> np.ndarray:
        """The coefficients of the guided output g_i in x_{i+1}, [n]."""
        return self.outputs[:, :, 0].sum(1)

    def propagated(self) -> np.ndarray:
        """Returns the coefficients of g_i in x_n, [n], while later outputs stay as they are.

        Multistep samplers use an output in several transitions; this counts them all.
        """
        n, lags = self.inputs.shape
        change = np.zeros((n + 1, n))  # of x_i, by the output that is changed
        used = self.outputs.sum(1)
        for i in range(n):
            for lag in range(min(lags, i + 1)):
                change[i + 1] += self.inputs[i, lag] * change[i - lag]
                change[i + 1, i - lag] += used[i, lag]
        return change[n]

    def effects(self, growth: np.ndarray | None = None) -> np.ndarray:
        """Returns what changes of the guided outputs make of the final result, [n], at a guess.

        Without `growth`, changes are taken to be propagated as by the sampler alone, but never to
        grow: samplers of models that predict noise amplify them (x_{i+1} has a multiple of x_i),
        and the models' next outputs undo it. `growth`, [n], is what the model leaves at the end of
        a change at a step.
        """
        left = np.append(np.abs(self._propagate_inputs())[1:], 1.0)
        effects = self.propagated() / np.maximum(left, 1.0)
        return effects if growth is None else effects * growth

    def _propagate_inputs(self) -> np.ndarray:
        """Returns what a change of x_i alone makes of x_n, [n], while outputs stay."""
        n, lags = self.inputs.shape
        change = np.eye(n + 1, n)
        for i in range(n):
            for lag in range(min(lags, i + 1)):
                change[i + 1] += self.inputs[i, lag] * change[i - lag]
        return change[n]

    @property
    def is_clear(self) -> np.ndarray:
        """Where a transition tells how the branches are guided, [n]."""
        least = 1e-6 * np.abs(self.outputs[:, :, 0]).max(initial=0.0)
        return (np.abs(self.direct) > least) & (self.residual < CLEAR)

    def shares(self) -> np.ndarray:
        """Returns the share of each branch in the guided output, [n, m]; each row adds up to 1.

        Steps whose transition does not tell it have the median of the others.
        """
        clear, m = self.is_clear, self.outputs.shape[1]
        shares = np.full((self.num_steps, m), 1 / m)
        if clear.any():
            shares[clear] = self.outputs[clear, :, 0] / self.direct[clear, None]
            median = np.median(shares[clear], axis=0)
            shares[~clear] = median / median.sum() if abs(median.sum()) > 1e-6 else 1 / m
        return shares

    def guided(self, recording: Recording) -> np.ndarray:
        """Returns the inner products of guided outputs, [n, n, n].

        The first axis is the step whose shares of the branches are applied to all outputs: what is
        forecast at this step from others is guided as at this step.
        """
        return combine_outputs(recording, self.shares())


def combine_outputs(recording: Recording, shares: np.ndarray) -> np.ndarray:
    """Returns the inner products of sums of branches, [n, n, n], for the shares [n, m]."""
    branches = range(len(recording.branches))
    same = np.allclose(shares, shares[:1], rtol=0, atol=1e-9)
    rows = shares[:1] if same else shares
    n = recording.num_steps
    grams = np.zeros((len(rows), n, n))
    for a in branches:
        for b in branches:
            grams += (rows[:, a] * rows[:, b])[:, None, None] * recording.outputs(a, b)
    return np.broadcast_to(grams, (n, n, n))


def identify(recording: Recording, *, lags: int = 3) -> Updates:
    """Returns the coefficients of the sampler that made this generation.

    They are the least-squares solution, transition by transition, with the fewest lags that make
    (nearly) all transitions exact, and without any where none do. Where x_n is unknown, the last
    transition is taken to be as the one before: only a factor that all effects have in common
    depends on it.

    Raises ValueError if `lags` is not positive, or an inner product is not finite.
    """
    if lags < 1:
        raise ValueError(f"lags: expected a positive number, found {lags}")
    check_finite(recording)
    n, m = recording.num_steps, len(recording.branches)
    known = n if recording.has_result else n - 1
    fits = [[_fit(recording, i, count) for i in range(known)] for count in range(1, lags + 1)]
    chosen = _choose([[fit[2] for fit in each] for each in fits])
    inputs, outputs = np.zeros((n, lags)), np.zeros((n, m, lags))
    residual = np.ones(n)
    for i, (own, used, left) in enumerate(fits[chosen]):
        inputs[i, : len(own)], outputs[i, :, : used.shape[1]], residual[i] = own, used, left
    found = Updates(inputs, outputs, residual)
    if m > 1 and known:
        _share_guidance(recording, found, chosen + 1)
    if known < n and known:
        inputs[-1], outputs[-1], residual[-1] = inputs[-2], outputs[-2], residual[-2]
    elif known < n:
        inputs[-1, 0], outputs[-1, :, 0] = 1.0, 1 / m
    return found


def _share_guidance(recording: Recording, found: Updates, lags: int) -> None:
    """Gives all transitions the same shares of the branches, unless these do not explain them.

    Late in a generation, branches hardly differ, and rounding would decide on their shares.
    """
    if not found.is_clear.any():
        return
    n, common = recording.num_steps, np.median(found.shares()[found.is_clear], axis=0)
    if abs(common.sum()) < 1e-6:
        return
    common /= common.sum()
    names = np.zeros((2 * n + 1, len(recording.gram)))
    names[: n + 1, : n + 1] = np.eye(n + 1)
    names[n + 1 :, n + 1 :] = np.kron(common, np.eye(n))
    gram = names @ np.nan_to_num(recording.gram) @ names.T
    guided = replace(recording, branches=("guided",), gram=gram)
    for i in range(n if recording.has_result else n - 1):
        own, used, left = _fit(guided, i, lags)
        if left <= SAME * found.residual[i] + EXACT:
            found.inputs[i, : len(own)] = own
            found.outputs[i, :, : len(own)] = common[:, None] * used
            found.residual[i] = left


def check_finite(recording: Recording) -> None:
    """Raises ValueError if an inner product that has to be known is not finite."""
    n = recording.num_steps
    known = np.delete(np.arange(len(recording.gram)), [] if recording.has_result else [n])
    if n == 0 or not recording.branches:
        raise ValueError(
            f"recording: expected a step and a branch, found {n} and {len(recording.branches)}"
        )
    if not np.isfinite(recording.gram[np.ix_(known, known)]).all():
        raise ValueError("recording: expected finite inner products, found some that are not")


def _choose(residuals: list[list[float]]) -> int:
    """Returns the index of the fewest lags that make nearly all transitions exact, or 0.

    A sampler that clips is explained better by lags, too, though it has none: clipped values stay.
    """
    exact = (np.array(residuals) < EXACT).mean(1) if residuals[0] else np.ones(1)
    return int(np.argmax(exact >= COMMON))


def _fit(recording: Recording, i: int, lags: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns the coefficients of inputs and outputs in x_{i+1}, and the relative residual.

    Neighbors are nearly equal, and so are branches: their differences are the basis. The target is
    the difference x_{i+1} - x_i.
    """
    n, m = recording.num_steps, len(recording.branches)
    lags = min(lags, i + 1)
    basis = _build_basis(n, m, i, lags)
    target = np.zeros(len(recording.gram))
    target[i + 1], target[i] = 1.0, -1.0
    names = np.flatnonzero(basis.any(0) | (target != 0))
    gram = recording.gram[np.ix_(names, names)]
    basis, target = basis[:, names], target[names]
    products, found = basis @ gram @ basis.T, basis @ gram @ target
    square = max(float(target @ gram @ target), 0.0)
    solution = solve(products, found)
    left = square - 2 * solution @ found + solution @ products @ solution
    freedom = recording.elements * recording.count - len(solution)
    factor = (freedom + len(solution)) / freedom if freedom > 0 else np.inf
    residual = np.sqrt(max(left, 0.0) / square * factor) if square > 0 else 0.0
    coefficients = np.zeros(len(recording.gram))
    coefficients[names] = solution @ basis
    coefficients[i] += 1.0
    steps = i - np.arange(lags)
    outputs = coefficients[n + 1 :].reshape(m, n)[:, steps]
    return coefficients[steps], outputs, float(residual)


def _build_basis(n: int, m: int, i: int, lags: int) -> np.ndarray:
    """Returns the regressors of x_{i+1}, [(1 + m) * lags, v], as sums of recorded vectors.

    They are the backward differences up to the order `lags` - 1 of the inputs, of the outputs of
    the first branch, and of the other branches' differences from these.
    """
    rows = np.zeros((lags, 1 + m, (1 + m) * n + 1))
    for order, weights in enumerate(_differences(lags)):
        for lag, weight in enumerate(weights):
            rows[order, 0, i - lag] = weight
            for b in range(m):
                rows[order, 1 + b, n + 1 + b * n + i - lag] = weight
    rows[:, 2:] -= rows[:, 1:2]
    return rows.reshape(lags * (1 + m), -1)


def _differences(count: int) -> list[list[float]]:
    """Returns the weights of the backward differences of the orders below `count`."""
    found = [[1.0]]
    while len(found) < count:
        last = found[-1]
        found.append([a - b for a, b in zip([*last, 0.0], [0.0, *last], strict=True)])
    return found


def solve(products: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Returns the least-squares solution from inner products; dependent regressors have 0."""
    scale = np.sqrt(np.maximum(np.diag(products), 0.0))
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    values, vectors = np.linalg.eigh(products * np.outer(inverse, inverse))
    keep = values > NULL * max(values[-1], 0.0)
    turned = vectors[:, keep].T @ (found * inverse)
    return inverse * (vectors[:, keep] @ (turned / values[keep]))
