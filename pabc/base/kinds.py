"""kinds: the kinds of regions that a schedule can name."""

from __future__ import annotations

KINDS = ("spatial", "temporal", "full", "joint", "cross", "mlp", "other")
"""Region kinds: attention on the latent stream, `mlp`, and `other` (attention elsewhere)."""


def check_kind(kind: object, name: str) -> None:
    """Raises `ValueError` unless `kind`, which the user gave as `name`, is one of `KINDS`."""
    if kind not in KINDS:
        raise ValueError(f"{name}: expected a kind, one of {', '.join(KINDS)}, found {kind!r}")
