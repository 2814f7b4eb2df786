"""Recordings of generations: inner products of what the model was given and what it computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

Vector = Sequence[torch.Tensor]
"""One vector, as the tensors whose elements it has, such as latents of a video and of its sound."""

_BLOCK = 1 << 16
"""The elements of each vector that are multiplied at once: what is converted to float64."""


@dataclass(frozen=True)
class Recording:
    """The inner products of all inputs and outputs of one generation, or the sum of several.

    A generation of n steps has the inputs x_0 to x_{n-1} (the latents as the model is given them),
    its result x_n, and for each of m branches an output at each step.

    Attributes:
        timesteps: [n] of the steps, in order.
        branches: [m] their names.
        gram: [v, v] in float64, with v = (n + 1) + m * n: first the inputs and the result, then the
            outputs, branch by branch. The row and column of the result are NaN where it is unknown.
            An output of a branch that was not called at a step is 0.
        count: generations that are summed.
        elements: numbers in one vector.
        peak: the range (maximum - minimum) of the result, or, where it is unknown, of the last
            input; of several generations, the largest.
        starts: steps at which another model takes over: nothing is reused from before them.

    Raises ValueError for a Gram matrix of another shape.
    """

    timesteps: tuple[float, ...]
    branches: tuple[str, ...]
    gram: np.ndarray
    count: int = 1
    elements: int = 1
    peak: float = 0.0
    starts: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        size = self.num_steps + 1 + len(self.branches) * self.num_steps
        if self.gram.shape != (size, size):
            raise ValueError(
                f"gram: expected shape {(size, size)} for {self.num_steps} steps and "
                f"{len(self.branches)} branches, found {self.gram.shape}"
            )

    @property
    def num_steps(self) -> int:
        """The number of steps."""
        return len(self.timesteps)

    @property
    def has_result(self) -> bool:
        """True if the result of the generation is known."""
        return bool(np.isfinite(self.gram[self.num_steps, self.num_steps]))

    def inputs(self) -> np.ndarray:
        """Returns the inner products of the inputs and the result, [n + 1, n + 1]."""
        return self.gram[: self.num_steps + 1, : self.num_steps + 1]

    def outputs(self, a: int, b: int) -> np.ndarray:
        """Returns the inner products of the outputs of two branches, [n, n]."""
        return self.gram[self._rows(a), self._rows(b)]

    def _rows(self, branch: int) -> slice:
        start = self.num_steps + 1 + branch * self.num_steps
        return slice(start, start + self.num_steps)

    def __add__(self, other: Recording) -> Recording:
        """Returns the recording of the generations of both.

        Raises ValueError for generations of other steps or branches.
        """
        for name in ("timesteps", "branches", "starts"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(f"{name}: expected {mine} as before, found {theirs}")
        return replace(
            self,
            gram=self.gram + other.gram,
            count=self.count + other.count,
            elements=max(self.elements, other.elements),
            peak=max(self.peak, other.peak),
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Returns the recording as arrays by name, to be stored by `numpy.savez`."""
        return {
            "timesteps": np.asarray(self.timesteps),
            "branches": np.asarray(self.branches),
            "gram": self.gram,
            "count": np.asarray(self.count),
            "elements": np.asarray(self.elements),
            "peak": np.asarray(self.peak),
            "starts": np.asarray(self.starts),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> Recording:
        """Returns the recording that `to_arrays` gave."""
        return cls(
            timesteps=tuple(map(float, arrays["timesteps"])),
            branches=tuple(map(str, arrays["branches"])),
            gram=np.asarray(arrays["gram"], dtype=np.float64),
            count=int(arrays["count"]),
            elements=int(arrays["elements"]),
            peak=float(arrays["peak"]),
            starts=tuple(map(int, arrays["starts"])),
        )


class Recorder:
    """Keeps the vectors of one generation, and multiplies them in the end.

    The vectors are kept as they are given: whoever may write to them later gives copies.
    """

    def __init__(self) -> None:
        self.inputs: dict[int, Vector] = {}
        self.outputs: dict[tuple[str, int], Vector] = {}

    def add_input(self, step: int, x: torch.Tensor | Vector) -> None:
        """Adds the latents that the model is given at a step."""
        self.inputs[step] = _as_vector(x)

    def add_output(self, branch: str, step: int, output: torch.Tensor | Vector) -> None:
        """Adds what a branch gives at a step."""
        self.outputs[branch, step] = _as_vector(output)

    @property
    def nbytes(self) -> int:
        """The bytes of the tensors that are kept."""
        vectors = (*self.inputs.values(), *self.outputs.values())
        return sum(tensor.nbytes for vector in vectors for tensor in vector)

    def finish(
        self,
        timesteps: Iterable[float],
        result: torch.Tensor | Vector | None = None,
        *,
        starts: tuple[int, ...] = (0,),
    ) -> Recording:
        """Returns the recording of the generation.

        Args:
            timesteps: one per step.
            result: the final latents, if they are known.
            starts: steps at which another model takes over.

        Raises ValueError for a step without an input, or vectors of different sizes.
        """
        steps = tuple(map(float, timesteps))
        n = len(steps)
        missing = [i for i in range(n) if i not in self.inputs]
        if missing:
            raise ValueError(f"inputs: expected one at each of {n} steps, found none at {missing}")
        branches = tuple(dict.fromkeys(branch for branch, _ in self.outputs))
        last = None if result is None else _as_vector(result)
        vectors: list[Vector | None] = [*(self.inputs[i] for i in range(n)), last]
        for branch in branches:
            vectors += (self.outputs.get((branch, i)) for i in range(n))
        gram = multiply(vectors)
        if last is None:
            gram[n], gram[:, n] = np.nan, np.nan
        shown = self.inputs[n - 1] if last is None else last
        return Recording(
            timesteps=steps,
            branches=branches,
            gram=gram,
            elements=sum(tensor.numel() for tensor in shown),
            peak=max(float(tensor.max() - tensor.min()) for tensor in shown),
            starts=starts,
        )


def multiply(vectors: Sequence[Vector | None]) -> np.ndarray:
    """Returns the inner products of all pairs of vectors, in float64; None is the vector 0.

    Products of neighbors differ from their squares by what a forecast errs, which is up to 1e-8 of
    them: too little for sums in float32. So blocks of elements are converted to float64.
    """
    known = [i for i, vector in enumerate(vectors) if vector is not None]
    gram = np.zeros((len(vectors), len(vectors)))
    parts = [vector for vector in vectors if vector is not None]
    found: torch.Tensor | None = None
    for k in range(len(parts[0]) if parts else 0):
        flat = [vector[k].reshape(-1) for vector in parts]
        sizes = {len(each) for each in flat}
        if len(sizes) > 1:
            raise ValueError(f"vectors: expected as many elements in each, found {sorted(sizes)}")
        for start in range(0, len(flat[0]), _BLOCK):
            block = torch.stack([each[start : start + _BLOCK].double() for each in flat])
            product = block @ block.T
            found = product if found is None else found + product
    if found is not None:
        gram[np.ix_(known, known)] = found.cpu().numpy()
    return gram


def _as_vector(x: torch.Tensor | Vector) -> Vector:
    return (x.detach(),) if isinstance(x, torch.Tensor) else tuple(part.detach() for part in x)
