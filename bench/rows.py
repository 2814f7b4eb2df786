"""Writes the rows of a benchmark one by one, so that an interrupted run can be resumed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import report

Row = dict[str, Any]


class Rows:
    """Rows by name, written to a file with each one that is added.

    Attributes:
        content: what is written: facts about the run, its settings, and the rows.
    """

    def __init__(
        self,
        out: Path | None,
        facts: Mapping[str, Any],
        settings: Mapping[str, Any],
        resume: bool,
        *,
        is_same_commit: bool = True,
    ) -> None:
        """Begins a run; with `resume`, keeps rows of `out` with the same settings and commit.

        With `is_same_commit` False, the commit may be another: each row should then name its own.
        """
        found = _read(out, settings, is_same_commit) if resume else {}
        self._out = out
        self.content: dict[str, Any] = {**facts, "settings": dict(settings), "rows": found}

    def __contains__(self, name: str) -> bool:
        return name in self.rows

    @property
    def rows(self) -> dict[str, Row]:
        """The rows so far, in the order in which they were measured."""
        rows: dict[str, Row] = self.content["rows"]
        return rows

    def add(self, name: str, row: Row) -> None:
        """Adds a row, and writes all rows."""
        self.rows[name] = row
        self.write()

    def measure(self, name: str, measure: Callable[[], Row]) -> None:
        """Adds what `measure` returns, unless there is a row of this name."""
        if name not in self:
            self.add(name, measure())

    def write(self, **more: Any) -> None:
        """Writes the rows and the facts about the run."""
        self.content.update(more)
        if self._out is not None:
            report.write_json(self._out, self.content)


def _read(out: Path | None, settings: Mapping[str, Any], is_same_commit: bool) -> dict[str, Row]:
    if out is None or not out.exists():
        return {}
    content = json.loads(out.read_text())
    is_same = content.get("settings") == json.loads(json.dumps(settings)) and (
        not is_same_commit or content["commit"] == report.read_commit()
    )
    return content["rows"] if is_same else {}


def add_options(parser: argparse.ArgumentParser, out: str = "JSON") -> None:
    """Adds the options that all such benchmarks have."""
    parser.add_argument("--out", type=Path, help=f"{out} to write, row by row")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows that --out has of these settings"
    )
    parser.add_argument("--smoke", action="store_true", help="smallest shapes, one round")
