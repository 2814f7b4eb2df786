"""release: the releases of PyTorch that pabc is tested with, and what is said about another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SUPPORTED = "2.11 to 2.14"
"""As in pyproject.toml."""


@contextmanager
def expecting(subject: str) -> Iterator[None]:
    """Makes a name that PyTorch lacks an error that tells which releases have it.

    Args:
        subject: what is imported within the context, such as "Inductor".

    Raises:
        ImportError: if a name that is imported or looked up within the context does not exist.
    """
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"pabc: expected torch {SUPPORTED}, found {torch.__version__}, whose {subject} differs "
            f"from what pabc uses: {error}"
        ) from error
