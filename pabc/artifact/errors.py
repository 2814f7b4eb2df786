"""The error that saving and loading raise."""

from __future__ import annotations


class ArtifactError(ValueError):
    """A model cannot be saved, or a file is damaged, or does not fit the model or machine."""
