"""kinds: the kinds of regions that a schedule can name."""

from __future__ import annotations

COARSE = ("block", "stack", "model")
"""Kinds of regions that contain others, from the inside out: the unit that a model repeats, all its
residual branches, and the whole call."""

FINE = ("spatial", "temporal", "full", "joint", "cross", "mlp", "other")
"""Kinds of single branches: attention on the latent stream, `mlp`, and `other` (attention
elsewhere)."""

KINDS = (*FINE, *COARSE)
"""All kinds of regions that a schedule can name."""


def check_kind(kind: object, name: str) -> None:
    """Raises `ValueError` unless `kind`, which the user gave as `name`, is one of `KINDS`."""
    if kind not in KINDS:
        raise ValueError(f"{name}: expected a kind, one of {', '.join(KINDS)}, found {kind!r}")
