"""numbers: which Python values count as numbers."""

from __future__ import annotations

from numbers import Real
from typing import Any


def is_number(leaf: Any) -> bool:
    """Returns True for a Python or NumPy number; a bool is a flag and not a number."""
    return isinstance(leaf, Real) and not isinstance(leaf, bool)
