"""Compensation: forecasts that also make up for the errors of the forecasts before them.

What a forecast errs becomes known, in good part, as soon as the next step is computed: the output
then lies between computed ones. So the weights of a skipped step are fitted to the output that is
wanted there *less* what the forecasts before it have left in the final result, as far as sources
can express that. It costs nothing: the weights are numbers as before.

The error of the final result is taken to be linear in the errors of forecasts, each scaled by the
effect of the output on the result. It is then a sum of recorded outputs, and its norm, with all
that cancels, follows from their inner products.

Shapes: p plans, n steps, m branches, k sources.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pabc.calibration.fit import solve_weights
from pabc.calibration.recording import Recording


@dataclass(frozen=True)
class Outputs:
    """The inner products of recorded outputs, and how the branches are guided.

    Attributes:
        gram: [m * n, m * n] branch by branch.
        shares: [n, m] of the branches in the guided output of each step.
    """

    gram: np.ndarray
    shares: np.ndarray

    @classmethod
    def from_recording(cls, recording: Recording, shares: np.ndarray) -> Outputs:
        """Returns the outputs of a recording; guided alike at all steps, they are one branch."""
        n = recording.num_steps
        gram = recording.gram[n + 1 :, n + 1 :]
        if np.allclose(shares, shares[:1], rtol=0, atol=1e-9):
            guide = np.kron(shares[:1], np.eye(n))
            return cls(guide @ gram @ guide.T, np.ones((n, 1)))
        return cls(gram, shares)

    @property
    def num_steps(self) -> int:
        """The number of steps."""
        return len(self.shares)

    def guided(self, step: int) -> np.ndarray:
        """Returns the inner products [n, n] of all outputs, guided as at this step."""
        n, share = self.num_steps, self.shares[step]
        parts = self.gram.reshape(len(share), n, len(share), n)
        return np.einsum("a,aibj,b->ij", share, parts, share)

    def multiply(self, errors: np.ndarray, step: int) -> np.ndarray:
        """Returns the inner products [p, n] of errors [p, m * n] with outputs guided as here."""
        parts = (errors @ self.gram).reshape(len(errors), -1, self.num_steps)
        return np.einsum("pan,a->pn", parts, self.shares[step])

    def norms(self, errors: np.ndarray) -> np.ndarray:
        """Returns the norms [p] of errors [p, m * n]: sums of outputs."""
        return np.sqrt(np.maximum(np.einsum("pi,pi->p", errors @ self.gram, errors), 0.0))


def find_histories(computed: np.ndarray, starts: tuple[int, ...], sources: int) -> np.ndarray:
    """Returns the last computed steps before each step, the newest first, [p, n, k]; -1 for none.

    Args:
        computed: [p, n] where plans compute.
        starts: steps at which another model takes over, with no history.
        sources: k, how many at most.
    """
    plans, n = computed.shape
    found = np.full((plans, n, sources), -1)
    last = np.full((plans, sources), -1)
    for step in range(n):
        if step in starts:
            last = np.full_like(last, -1)
        found[:, step] = last
        newer = np.concatenate([np.full((plans, 1), step), last[:, :-1]], 1)
        last = np.where(computed[:, step, None], newer, last)
    return found


def compensate(
    outputs: Outputs,
    computed: np.ndarray,
    effects: np.ndarray,
    *,
    sources: int,
    starts: tuple[int, ...] = (0,),
    compensation: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the weights of plans, [p, n, k], and the norms of what they err, [p, n].

    The norms are those of the errors that all forecasts up to a step leave in the final result.

    Args:
        outputs: that were recorded.
        computed: [p, n] where plans compute.
        effects: [n] of the guided output of a step on the final result.
        sources: k, the last computed outputs that a forecast is the weighted sum of, at most.
        starts: steps at which another model takes over.
        compensation: the share of the error so far that a forecast makes up for.
    """
    histories = find_histories(computed, starts, sources)
    weights, norms = np.zeros(histories.shape), np.zeros(computed.shape)
    errors = np.zeros((len(computed), len(outputs.gram)))
    largest = np.abs(effects).max(initial=0.0)
    for step in range(outputs.num_steps):
        rows = np.flatnonzero(~computed[:, step])
        if len(rows):
            history = histories[rows, step]
            gram = outputs.guided(step)
            before = np.zeros((len(rows), outputs.num_steps))
            if abs(effects[step]) > 1e-6 * largest:
                before = outputs.multiply(errors[rows], step) * (compensation / effects[step])
            wanted = gram[step] - before
            known = np.where(history >= 0, history, history[:, :1])
            inner = gram[known[:, :, None], known[:, None, :]]
            cross = np.take_along_axis(wanted, known, 1)
            weights[rows, step] = solve_weights(inner, cross, history)
        errors = add_errors(outputs, errors, step, rows, histories, weights, effects)
        norms[:, step] = outputs.norms(errors)
    return weights, norms


def add_errors(
    outputs: Outputs,
    errors: np.ndarray,
    step: int,
    rows: np.ndarray,
    histories: np.ndarray,
    weights: np.ndarray,
    effects: np.ndarray,
) -> np.ndarray:
    """Returns the errors [p, m * n] with those of the forecasts at this step, of some plans."""
    if not len(rows):
        return errors
    history = histories[rows, step]
    made = np.zeros((len(rows), outputs.num_steps))
    used = np.where(history >= 0, weights[rows, step], 0.0)
    np.add.at(made, (np.arange(len(rows))[:, None], np.maximum(history, 0)), used)
    made[:, step] -= 1.0
    share = effects[step] * outputs.shares[step]
    errors[rows] += np.einsum("a,pn->pan", share, made).reshape(len(rows), -1)
    return errors


def predict(
    outputs: Outputs,
    computed: np.ndarray,
    weights: np.ndarray,
    effects: np.ndarray,
    *,
    starts: tuple[int, ...] = (0,),
) -> np.ndarray:
    """Returns the norms of the errors that plans leave in the final result, [p].

    Args:
        outputs: that were recorded.
        computed: [p, n] where plans compute.
        weights: [p, n, k] of forecasts.
        effects: [n] of the guided output of a step on the final result.
        starts: steps at which another model takes over.
    """
    histories = find_histories(computed, starts, weights.shape[-1])
    errors = np.zeros((len(computed), len(outputs.gram)))
    for step in range(outputs.num_steps):
        rows = np.flatnonzero(~computed[:, step])
        errors = add_errors(outputs, errors, step, rows, histories, weights, effects)
    return outputs.norms(errors)
