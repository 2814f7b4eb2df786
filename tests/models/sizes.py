"""The sizes that all models here share."""

from __future__ import annotations

WIDTH = 16
HEADS = 2
CHANNELS = 3
PATCH = 2
