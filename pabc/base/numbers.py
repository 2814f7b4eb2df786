"""numbers: which Python values count as numbers, and tensors that hold one."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import torch


def is_number(leaf: Any) -> bool:
    """Returns True for a Python or NumPy number; a bool is a flag and not a number."""
    return isinstance(leaf, Real) and not isinstance(leaf, bool)


def as_tensor(number: Any) -> torch.Tensor:
    """Returns a tensor without dimensions, as precise as Python's number: int64 or float64."""
    if isinstance(number, Integral):
        return torch.tensor(int(number), dtype=torch.int64)
    return torch.tensor(float(number), dtype=torch.float64)
