"""Fills the table of pipelines, row by row: `table.json`, the README's table, and the recipes.

    python tests/matrix/write.py [--rows NAME...] [--columns NAME...] [--missing]

Each row is written when it is done, so a run that ended is continued with `--missing`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from matrix import ranks, table
from matrix.columns import COLUMNS, Column
from matrix.rows import ROWS
from matrix.trial import Trial, describe


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", nargs="*", metavar="NAME", help="only these")
    parser.add_argument("--columns", nargs="*", metavar="NAME", help="only these")
    parser.add_argument("--missing", action="store_true", help="only cells that are not filled")
    asked = parser.parse_args()
    known = {"rows": [row.name for row in ROWS], "columns": [column.name for column in COLUMNS]}
    for option, names in known.items():
        if unknown := set(getattr(asked, option) or ()) - set(names):
            parser.error(
                f"--{option}: expected some of {names}, found {', '.join(sorted(unknown))}"
            )
    return asked


def fill(trial: Trial, columns: Collection[Column]) -> Iterator[tuple[str, str]]:
    """Yields the cells of a row; prints each, with the seconds of processors that it took."""
    for column in columns:
        start = sum(os.times()[:4])
        cell = column(trial)
        tell(trial.row.name, column.name, cell, sum(os.times()[:4]) - start)
        yield column.name, cell


def tell(row: str, column: str, cell: str, seconds: float) -> None:
    """Prints a cell."""
    print(f"{row:28} {column:20} {seconds:6.1f} s  {cell}", flush=True)


def save(row: str, found: Mapping[str, str]) -> None:
    """Writes cells of a row."""
    cells = table.read()
    before = cells.setdefault(row, {})
    before.update({n: table.keep_reason(before.get(n), cell) for n, cell in found.items()})
    table.write(cells)


def main() -> None:
    torch.set_num_threads(1)
    asked, on_ranks = parse(), []
    for row in ROWS:
        before = table.read().get(row.name, {})
        columns = {
            column.name: column
            for column in COLUMNS
            if (not asked.columns or column.name in asked.columns)
            and (not asked.rows or row.name in asked.rows)
            and not (asked.missing and column.name in before)
        }
        if columns.pop("ranks", None) and "ranks" not in row.untried:
            on_ranks.append(row.name)
        found = {}
        try:
            found.update(fill(Trial(row), columns.values()))
        except Exception as error:  # the row itself: the others are tried all the same
            print(f"{row.name:28} is wrong: {describe(error)}", flush=True)
        save(row.name, found)
    for name, cell in ranks.find_cells(on_ranks):  # in one pair of processes, as far as they go
        tell(name, "ranks", cell, 0.0)
        save(name, {"ranks": cell})


if __name__ == "__main__":
    main()
