"""format: byte counts, sets of indices and tables as text."""

from __future__ import annotations

from collections.abc import Sequence


def format_numbers(numbers: set[int]) -> str:
    """Returns `{0, 1, 2, 5}` as `0-2,5`."""
    starts = sorted(n for n in numbers if n - 1 not in numbers)
    ends = sorted(n for n in numbers if n + 1 not in numbers)
    runs = zip(starts, ends, strict=True)
    return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in runs)


def format_bytes(count: int) -> str:
    """Returns `2097152` as `2.0 MiB`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def format_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Returns the lines of a table with aligned columns, indented by two spaces."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
