"""Clipping: what a sampler that clips its prediction does, identified from one of its transitions.

Such a sampler is not linear, but it treats all elements of the latents alike:

    x_{i+1} = own x_i + used g_i + gain clip(u_i, -limit, limit)
    u_i = cos(angle) x_i / |x| + sin(angle) g_i / |g|

where g_i is the guided output, and |x| and |g| are the root mean squares in the recording. Angle
and limit are searched; the rest is least squares. Noise that the sampler adds is left over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from pabc.calibration.recording import Vector

SAMPLED = 4096
"""The elements that a fit is made from, at most."""
ANGLES = 24
SHARES = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)
"""The shares of elements within the limit that are tried first."""
ROUNDS = 14
SHRINK = 0.6
"""The range of each round of the search, relative to that of the one before."""
CLEAR = 10.0
"""The least ratio of what clipping explains to what it would by chance (the F statistic)."""


@dataclass(frozen=True)
class Clip:
    """A transition that clips.

    Attributes:
        own, used, gain: the coefficients of the latents, the guided output, and what is clipped.
        along, across: the coefficients of the latents and the guided output in what is clipped.
        limit: the largest value that is left as it is.
        residual: the root mean square of what is left over, relative to that of the change.
    """

    own: float
    used: float
    gain: float
    along: float
    across: float
    limit: float
    residual: float

    def change(self, x: Vector, g: Vector, dx: Vector, dg: Vector) -> Vector:
        """Returns what changes of the latents and the guided output make of the next latents."""
        found = []
        for a, b, da, db in zip(x, g, dx, dg, strict=True):
            now, before = self._clip(a + da, b + db), self._clip(a, b)
            found.append(self.own * da + self.used * db + self.gain * (now - before))
        return found

    def _clip(self, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return (self.along * x + self.across * g).clamp(-self.limit, self.limit)


def find_clip(x: Vector, g: Vector, following: Vector) -> Clip | None:
    """Returns how the latents that follow are made by clipping; None: without, as far as is told.

    Args:
        x, g: the latents and the guided output of a step.
        following: the latents of the next step.
    """
    a, b, y = (_sample(each) for each in (x, g, following))
    scales = [float(np.sqrt(np.square(each).mean())) for each in (a, b)]
    if not all(math.isfinite(s) and s > 0 for s in (*scales, float(np.abs(y).sum()))):
        return None
    fit = _Fit(a / scales[0], b / scales[1], y)
    plain = fit.left(np.zeros((1, len(y))))[0]
    angle, limit = _search(fit)
    u = fit.mix(np.array([angle]))
    found, left = fit.solve(np.clip(u, -limit, limit))
    freedom = len(y) - 5
    change = float(np.square(y - a).sum())
    if freedom < 1 or change <= 0 or plain - left[0] < CLEAR * 3 * max(left[0], 0.0) / freedom:
        return None
    own, used, gain = (float(each) for each in found[0])
    along, across = math.cos(angle) / scales[0], math.sin(angle) / scales[1]
    rest = math.sqrt(max(float(left[0]), 0.0) / change)
    return Clip(own / scales[0], used / scales[1], gain, along, across, limit, rest)


class _Fit:
    """Least squares of y over x, g and what is clipped, for many ways to clip at once."""

    def __init__(self, x: np.ndarray, g: np.ndarray, y: np.ndarray) -> None:
        self._known, self._y = np.stack([x, g]), y

    def mix(self, angles: np.ndarray) -> np.ndarray:
        """Returns what is clipped, one row per angle."""
        return np.stack([np.cos(angles), np.sin(angles)], 1) @ self._known

    def solve(self, clipped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the coefficients, [k, 3], and the squares that are left, [k]."""
        k = len(clipped)
        products, found = np.zeros((k, 3, 3)), np.zeros((k, 3))
        products[:, :2, :2] = self._known @ self._known.T
        products[:, :2, 2] = products[:, 2, :2] = clipped @ self._known.T
        products[:, 2, 2] = np.square(clipped).sum(1)
        found[:, :2], found[:, 2] = self._known @ self._y, clipped @ self._y
        ridge = 1e-12 * np.trace(products, axis1=1, axis2=2) + 1e-300
        products += ridge[:, None, None] * np.eye(3)
        solution = np.linalg.solve(products, found[:, :, None])[:, :, 0]
        return solution, float(self._y @ self._y) - (solution * found).sum(1)

    def left(self, clipped: np.ndarray) -> np.ndarray:
        """Returns the squares that are left, [k]."""
        return self.solve(clipped)[1]


def _search(fit: _Fit) -> tuple[float, float]:
    """Returns the angle and the limit with which the least is left, by ever finer grids."""
    angles = np.arange(ANGLES) * math.pi / ANGLES
    mixed = np.repeat(fit.mix(angles), len(SHARES), 0)
    quantiles = np.quantile(np.abs(mixed[:: len(SHARES)]), SHARES, axis=1).T.reshape(-1, 1)
    best = int(fit.left(np.clip(mixed, -quantiles, quantiles)).argmin())
    angle, limit = float(angles[best // len(SHARES)]), float(quantiles[best, 0])
    width, factor = math.pi / ANGLES, 1.0
    offsets = np.linspace(-1, 1, 5)
    for _ in range(ROUNDS):
        turned = np.repeat(angle + width * offsets, len(offsets))
        limits = np.tile(limit * np.exp(factor * offsets), len(offsets))[:, None]
        best = int(fit.left(np.clip(fit.mix(turned), -limits, limits)).argmin())
        angle, limit = float(turned[best]), float(limits[best, 0])
        width, factor = SHRINK * width, SHRINK * factor
    return angle, limit


def _sample(vector: Vector) -> np.ndarray:
    """Returns elements of a vector, evenly spaced, in float64."""
    flat = [part.detach().reshape(-1) for part in vector]
    each = -(-sum(map(len, flat)) // SAMPLED)
    return torch.cat([part[::each].to("cpu", torch.float64) for part in flat]).numpy()
