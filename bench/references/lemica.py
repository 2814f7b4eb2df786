"""LeMiCa: the path of calls whose worst segments, measured at the final result, are smallest.

Source: Gao et al., "LeMiCa: Lexicographic Minimax Path Caching for Efficient Diffusion-Based Video
Generation", arXiv 2511.00090. A node is a step, an edge i -> j computes steps i and j and holds
the output of step i between them. The weight of an edge is the mean absolute error of the final
result if these calls alone are skipped. Of all paths with the number of computed calls that is
asked for, the one is taken whose edges' weights, sorted from the largest, are the smallest in
lexicographic order.

Here the output of the whole model is held. All segments that begin at one step are measured as one
batch; calls before them are not run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Weights = dict[tuple[int, int], float]
"""Edge (i, j) -> its weight."""


class Loop(Protocol):
    """A sampling loop of B clips whose model is called with the conditional and the unconditional
    batch as one."""

    num_calls: int

    def repeat(self, times: int) -> Loop:
        """Returns the loop with its clips repeated as a whole."""
        ...

    def run(self, call: Any) -> Tensor:
        """Runs the loop with `call` in place of the model; returns the latents."""
        ...


def measure_segments(
    loop: Loop, model: Any, outputs: Sequence[Tensor], result: Tensor, max_gap: int
) -> Weights:
    """Returns the weights of all edges of at most `max_gap` steps.

    Args:
        loop: the calibration clips, B of them.
        model: called as the loop calls it.
        outputs: [2 B, ...] of each call of the full run.
        result: [B, ...] of the full run.
        max_gap: the largest j - i.
    """
    weights = {(i, i + 1): 0.0 for i in range(loop.num_calls - 1)}
    for start in range(loop.num_calls - 2):
        ends = range(start + 2, min(start + max_gap, loop.num_calls - 1) + 1)
        replay = Segments(model, outputs, start, ends)
        found = loop.repeat(len(ends)).run(replay)
        errors = (found.unflatten(0, (len(ends), -1)) - result).abs().flatten(1).mean(1)
        weights |= {(start, end): float(e) for end, e in zip(ends, errors, strict=True)}
    return weights


class Segments:
    """Stands in for the model while one segment per row is skipped: row r up to step ends[r].

    The batch is [2, rows, B], flattened. Up to the start, it returns recorded outputs.
    """

    def __init__(self, model: Any, outputs: Sequence[Tensor], start: int, ends: range) -> None:
        self.model, self.outputs, self.start, self.ends = model, outputs, start, ends
        self.step = -1

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        """Returns what each row holds, recorded or computed with the rows that go on."""
        self.step += 1
        rows, known = len(self.ends), self.outputs[min(self.step, self.start)]
        held = known.unflatten(0, (2, 1, -1)).expand(2, rows, -1, *known.shape[1:])
        active = sum(end <= self.step for end in self.ends) if self.step > self.start else 0
        if not active:
            return (held.flatten(0, 2),)
        size = held.shape[2]

        def pick(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.dim() == 0 or len(x) != 2 * rows * size:
                return x
            return x.unflatten(0, (2, rows, size))[:, :active].flatten(0, 2)

        computed = self.model(*map(pick, args), **{k: pick(v) for k, v in kwargs.items()})[0]
        computed = computed.unflatten(0, (2, active, size))
        return (torch.cat([computed, held[:, active:]], 1).flatten(0, 2),)


def find_path(weights: Weights, num_calls: int, computed: int) -> tuple[int, ...]:
    """Returns the steps of the lexicographic minimax path with exactly `computed` nodes.

    It begins at the first step and ends at the last. Sorted weights keep their order if both get
    the same edge more, so the best path to a node is part of the best path through it.

    Raises ValueError if there is none: the edges are too short.
    """
    best: dict[int, tuple[list[float], tuple[int, ...]]] = {0: ([], (0,))}
    for _ in range(computed - 1):
        reached: dict[int, tuple[list[float], tuple[int, ...]]] = {}
        for (i, j), weight in weights.items():
            if i in best:
                costs, path = best[i]
                found = (sorted([*costs, weight], reverse=True), (*path, j))
                reached[j] = min(reached.get(j, found), found)
        best = reached
    if num_calls - 1 not in best:
        raise ValueError(
            f"computed: expected a number of calls that the measured segments allow, found"
            f" {computed} of {num_calls}"
        )
    return best[num_calls - 1][1]
