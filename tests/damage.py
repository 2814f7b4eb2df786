"""Damages the bytes of a file in the ways that disks and interrupted copies do."""

from __future__ import annotations

import random
from collections.abc import Iterator


def damage(whole: bytes, count: int = 24) -> Iterator[bytes]:
    """Yields the bytes cut short, with flipped bits, with noise, and with zeros, in turn."""
    source = random.Random(0)
    for i in range(count):
        start = source.randrange(len(whole))
        size = min(64, len(whole) - start)
        if i % 4 == 0:
            yield whole[:start]
        elif i % 4 == 1:
            yield (
                whole[:start]
                + bytes([whole[start] ^ 1 << source.randrange(8)])
                + whole[start + 1 :]
            )
        elif i % 4 == 2:
            yield whole[:start] + source.randbytes(size) + whole[start + size :]
        else:
            yield whole[:start] + bytes(size) + whole[start + size :]
