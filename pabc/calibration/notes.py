"""Keeps what a calibration has run so far in a file, from which it resumes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pabc.calibration import measurement
from pabc.calibration.candidates import Candidate
from pabc.calibration.costs import Costs
from pabc.calibration.digests import describe_weights
from pabc.calibration.files import Arrays, nest, read_arrays, unnest, write_arrays
from pabc.calibration.measurement import Measurement, Plan
from pabc.calibration.recording import Recording

KIND = "calibration in progress"
"""The mark of the files."""


@dataclass(frozen=True)
class Reference:
    """A full generation that was recorded.

    Attributes:
        recording: the inner products.
        result: the numbers in what it returned.
        opening: step -> numbers out of the inputs of its first call.
        precision: of its first call; empty in notes that do not say.
    """

    recording: Recording
    result: list[torch.Tensor]
    opening: dict[int, list[torch.Tensor]]
    precision: str = ""


@dataclass
class Notes:
    """Recorded and measured generations, written to a file as they come.

    Attributes:
        model: the fingerprint of the model.
        path: of the file; None: nothing is written.
        references: seed -> the full generation.
        measured: plan -> its measurement.
        full, skipped: seconds of calls.
    """

    model: str
    path: Path | None = None
    references: dict[int, Reference] = field(default_factory=dict)
    measured: dict[Plan, Measurement] = field(default_factory=dict)
    full: list[float] = field(default_factory=list)
    skipped: list[float] = field(default_factory=list)

    @classmethod
    def open(cls, model: str, path: str | os.PathLike[str] | None) -> Notes:
        """Returns the notes in a file, or new ones if there is no such file.

        Raises ValueError for a file of another kind or model, or a damaged one.
        """
        notes = cls(model, None if path is None else Path(path))
        if notes.path is not None and not notes.path.parent.is_dir():
            raise ValueError(f"resume: expected a file in a folder, found no {notes.path.parent}")
        if notes.path is not None and notes.path.exists():
            found = read_arrays(notes.path, KIND, cls._from_arrays)
            if found.model != model:
                raise ValueError(
                    f"resume: expected notes of this model, found those of another in {notes.path}"
                )
            return replace(found, path=notes.path)
        return notes

    @property
    def costs(self) -> Costs:
        """The seconds of full and skipped calls."""
        return Costs.of(self.full, self.skipped)

    def recording(self, seeds: Iterable[int]) -> Recording:
        """Returns the sum of the recordings of these seeds."""
        first, *others = (self.references[seed].recording for seed in seeds)
        for other in others:
            first = first + other
        return first

    def add_reference(self, seed: int, reference: Reference) -> None:
        """Adds a full generation."""
        self.references[seed] = reference
        self._write()

    def add_measured(self, candidate: Candidate, predicted: float, seed: int, found: float) -> None:
        """Adds the PSNR of a plan's generation."""
        new = Measurement(candidate, predicted)
        old = self.measured.get(new.plan, new)
        decibels = {**old.decibels, seed: found}
        self.measured[new.plan] = replace(old, decibels=decibels)
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        arrays: Arrays = {
            "model": np.asarray(self.model),
            "full": np.asarray(self.full),
            "skipped": np.asarray(self.skipped),
            "seeds": np.asarray(list(self.references), dtype=np.int64),
        }
        for seed, reference in self.references.items():
            arrays |= nest(f"reference.{seed}", _to_arrays(reference))
            num_steps = reference.recording.num_steps
        found = measurement.to_arrays(tuple(self.measured.values()), num_steps)
        write_arrays(self.path, KIND, arrays | nest("measured", found))

    @classmethod
    def _from_arrays(cls, arrays: Arrays) -> Notes:
        seeds = arrays["seeds"].tolist()
        found = measurement.from_arrays(unnest("measured", arrays))
        return cls(
            str(arrays["model"]),
            references={s: _from_arrays(unnest(f"reference.{s}", arrays)) for s in seeds},
            measured={each.plan: each for each in found},
            full=arrays["full"].tolist(),
            skipped=arrays["skipped"].tolist(),
        )


def _to_arrays(reference: Reference) -> Arrays:
    arrays: Arrays = nest("recording", reference.recording.to_arrays())
    arrays["precision"] = np.asarray(reference.precision)
    arrays |= {f"result.{i}": tensor.numpy() for i, tensor in enumerate(reference.result)}
    for step, parts in reference.opening.items():
        arrays |= {f"opening.{step}.{i}": part.numpy() for i, part in enumerate(parts)}
    return arrays


def _from_arrays(arrays: Arrays) -> Reference:
    openings = {int(name.split(".")[1]) for name in arrays if name.startswith("opening.")}
    return Reference(
        Recording.from_arrays(unnest("recording", arrays)),
        _tensors(unnest("result", arrays)),
        {step: _tensors(unnest(f"opening.{step}", arrays)) for step in sorted(openings)},
        str(arrays.get("precision", "")),
    )


def _tensors(arrays: Arrays) -> list[torch.Tensor]:
    return [torch.from_numpy(arrays[name]) for name in sorted(arrays, key=int)]


def fingerprint(model: Any) -> str:
    """Returns a digest of the weights of a model, or of all modules of a pipeline."""
    if isinstance(model, nn.Module):
        return describe_weights({"": model})
    parts = getattr(model, "components", None) or vars(model)
    return describe_weights({n: part for n, part in parts.items() if isinstance(part, nn.Module)})
