"""All rows, by family."""

from __future__ import annotations

from . import flux, hunyuan, image, other, video, wan
from .row import Row

ROWS: tuple[Row, ...] = (
    *wan.ROWS,
    *hunyuan.ROWS,
    *video.ROWS,
    *flux.ROWS,
    *image.ROWS,
    *other.ROWS,
)


def find_row(name: str) -> Row:
    """Returns the row of this name."""
    return next(row for row in ROWS if row.name == name)
