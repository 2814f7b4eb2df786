"""Reads the numbers in what a generation returns, and compares two generations by them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch


def as_tensors(result: Any) -> list[torch.Tensor]:
    """Returns the numbers in a result as float32 tensors on the CPU, in order.

    `result`: a tensor, an array, a picture, or mappings, sequences and dataclasses of these, such
    as a pipeline's output. Anything else in it, and arrays of bools, are ignored.

    Raises TypeError if there is none, ValueError for NaN and infinity, and if all are empty.
    """
    found = list(_find_tensors(result))
    if not found:
        raise TypeError(
            "sample: expected it to return a tensor, an array or pictures, found "
            f"{type(result).__name__} without any"
        )
    if not any(tensor.numel() for tensor in found):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in found)
        raise ValueError(f"sample: expected a result of finite numbers, found none in {shapes}")
    if not all(bool(tensor.isfinite().all()) for tensor in found):
        raise ValueError("sample: expected a result of finite numbers, found NaN or infinity")
    return found


def _find_tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, Mapping):
        value = list(value.values())
    elif is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, torch.Tensor):
        if value.dtype != torch.bool:
            yield value.detach().to(device="cpu", dtype=torch.float32)
    elif isinstance(value, np.ndarray) or hasattr(value, "__array_interface__"):
        array = np.asarray(value)
        if array.dtype.kind in "fiu":
            yield torch.from_numpy(array.astype(np.float32))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _find_tensors(item)


def decibels(full: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> float:
    """Returns the peak signal-to-noise ratio of a result to the full one, in dB.

    The peak is the range (maximum - minimum) of the full result. Equal results have infinite dB.

    Raises ValueError for results of different shapes.
    """
    shapes, others = ([tuple(t.shape) for t in result] for result in (full, found))
    if shapes != others:
        raise ValueError(
            f"sample: expected a result of shapes {shapes}, as of the full generation, found "
            f"{others}"
        )
    total = sum(
        float((a.double() - b.double()).square().sum()) for a, b in zip(full, found, strict=True)
    )
    if total == 0:
        return math.inf
    peak = max(float(t.max()) for t in full) - min(float(t.min()) for t in full)
    mean = total / sum(t.numel() for t in full)
    return 10 * math.log10(peak**2 / mean) if peak else -math.inf
