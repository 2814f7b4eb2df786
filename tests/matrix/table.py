"""The table of all cells: a file of JSON, and what documents show of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from .columns import COLUMNS
from .row import Cell
from .rows import ROWS

Cells = dict[str, dict[str, Cell]]
"""Row -> column -> cell."""
FILE = Path(__file__).with_name("table.json")
FOLDER = Path(__file__).resolve().parents[2] / "pabc" / "pipelines"
README, RECIPES = FOLDER / "README.md", FOLDER / "RECIPES.md"
BEGIN, END = "<!-- matrix: begin -->\n", "<!-- matrix: end -->"
LABEL = "```python no-run: needs published weights"


def read() -> Cells:
    """Returns the cells that were found before."""
    return json.loads(FILE.read_text())["rows"] if FILE.exists() else {}


def write(cells: Cells) -> None:
    """Writes the cells, in the order of rows and columns, and the documents."""
    rows = {
        row.name: {c.name: cells[row.name][c.name] for c in COLUMNS if c.name in cells[row.name]}
        for row in ROWS
        if row.name in cells
    }
    versions = {name: version(name) for name in ("diffusers", "torch")}
    FILE.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
    README.write_text(with_table(README.read_text(), format_table(rows)))
    RECIPES.write_text(format_recipes())


def state(cell: Cell) -> str:
    """Returns the cell without its reason."""
    return cell.partition(": ")[0]


def keep_reason(before: Cell | None, found: Cell) -> Cell:
    """Returns what was found, with the reason that was written before if nothing else changed."""
    return before if before is not None and state(before) == state(found) else found


def with_table(document: str, table: str) -> str:
    """Returns the document with the table between its marks."""
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    return re.sub(pattern, lambda _: BEGIN + table + END, document, flags=re.DOTALL)


def format_table(cells: Mapping[str, Mapping[str, Cell]]) -> str:
    """Returns the table in Markdown, with the reasons below it."""
    reasons: dict[str, int] = {}

    def show(cell: Cell) -> str:
        word, _, reason = cell.partition(": ")
        number = reasons.setdefault(reason, len(reasons) + 1) if reason else 0
        return f"{word} ({number})" if reason else word

    lines = [
        "| pipeline | " + " | ".join(column.title for column in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for row in ROWS:
        found = cells.get(row.name, {})
        shown = [show(found.get(column.name, "untried")) for column in COLUMNS]
        lines.append(f"| {row.name} | {' | '.join(shown)} |")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join(["", *lines, "", *notes, *([""] if notes else [])]) + "\n"


def format_recipes() -> str:
    """Returns the document of recipes."""
    parts = [HEAD]
    for row in ROWS:
        code = row.recipe.code(row.pipeline)
        parts.append(f"## {row.name}\n\n{LABEL}\n{code}\n```\n")
    return "\n".join(parts)


HEAD = """# Recipes

A pipeline each, with published weights. They take `import diffusers, pabc, torch, transformers`, a
`prompt`, and what else they name: a `negative_prompt`, an `image`, for Wan VACE a list of `frames`
and one of `masks`. The first call is recorded; make it again, with any prompt, and it follows the
plan ([what `pabc.auto` takes](../automatic/README.md)). A model that does not fit is offloaded as
diffusers does it, before or after `compile_pipeline`: see
[which pipelines are tried](README.md#pipelines-that-are-tried).

`python tests/matrix/write.py` writes this document.
"""
