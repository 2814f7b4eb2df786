"""The one error of artifacts."""

from __future__ import annotations


class ArtifactError(ValueError):
    """A model cannot be saved, or an artifact is damaged or made for something else."""
