"""DPCache: the path of calls with the least sum of errors, each given the two calls before it.

Source: Cui et al., "Denoising as Path Planning: Training-Free Acceleration of Diffusion Models with
DPCache", arXiv 2602.22654. The path-aware cost of (i, j, k), three computed steps in a row, is the
error of what is predicted for the steps between j and k from what is stored at i and j. Dynamic
programming over pairs of steps finds the path with the least total cost. Skipped steps follow from
Taylor's series with finite differences (TaylorSeer, arXiv 2503.06923).

Here the output of the whole model is stored, errors are relative in the L1 norm, and the first
two steps and the last are computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

Costs = npt.NDArray[np.float64]


def measure_costs(outputs: Sequence[Tensor], max_gap: int) -> Costs:
    """Returns the costs [n, n, n] of (i, j, k); infinite where a gap is larger than `max_gap`."""
    n = len(outputs)
    costs = np.full((n, n, n), np.inf)
    sizes = [float(o.abs().mean()) for o in outputs]
    for j in range(1, n - 1):
        for i in range(max(0, j - max_gap), j):
            slope = (outputs[j] - outputs[i]) / (j - i)
            total = 0.0
            for k in range(j + 1, min(j + max_gap, n - 1) + 1):
                costs[i, j, k] = total
                guess = outputs[j] + (k - j) * slope
                total += float((outputs[k] - guess).abs().mean()) / sizes[k]
    return costs


def find_path(costs: Costs, computed: int) -> tuple[int, ...]:
    """Returns the steps of the cheapest path of exactly `computed` from steps 0, 1 to the last.

    Raises ValueError if there is none: gaps are limited.
    """
    n = len(costs)
    best = np.full((n, n), np.inf)  # of paths that end in (i, j)
    best[0, 1] = 0
    origins: list[npt.NDArray[np.intp]] = []
    for _ in range(computed - 2):
        totals = best[:, :, None] + costs  # i, j, k
        origins.append(totals.argmin(0))
        best = totals.min(0)
    j = int(best[:, n - 1].argmin())
    if computed < 2 or not np.isfinite(best[j, n - 1]):
        raise ValueError(
            f"computed: expected a number of calls that gaps allow, found {computed} of {n}"
        )
    path = [n - 1, j]
    for origin in reversed(origins):
        path.append(int(origin[path[-1], path[-2]]))
    return tuple(reversed(path))
