"""The table of pipelines is true: its cells are what is found, the documents show them, and each
recipe calls what diffusers has.

The cheap columns are checked with all tests, the others with `PABC_MATRIX=all`.
"""

from __future__ import annotations

import ast
import inspect
import os

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

import diffusers
from matrix import table
from matrix.columns import COLUMNS
from matrix.row import Row
from matrix.rows import ROWS
from matrix.trial import Trial

pytestmark = pytest.mark.runtime
CELLS = table.read()
EVERYTHING = os.environ.get("PABC_MATRIX") == "all"
every_row = pytest.mark.parametrize("row", ROWS, ids=str)


@every_row
def test_the_cells_are_what_is_found(row: Row) -> None:
    trial = Trial(row)
    columns = [column for column in COLUMNS if column.is_cheap or EVERYTHING]
    found = {column.name: column(trial) for column in columns}
    written = {column.name: CELLS[row.name].get(column.name, "untried") for column in columns}
    differ = {
        name: f"{written[name]} is written, {cell} is found"
        for name, cell in found.items()
        if table.state(cell) != table.state(written[name])
        and table.state(written[name]) != "untried"
    }
    assert not differ, "write the table again if this is meant: python tests/matrix/write.py"


def test_the_table_has_all_rows_and_columns() -> None:
    assert list(CELLS) == [row.name for row in ROWS]
    known = {column.name for column in COLUMNS}
    assert all(set(cells) <= known for cells in CELLS.values())
    reasons = [cell for cells in CELLS.values() for cell in cells.values() if cell.startswith("no")]
    assert all(": " in cell for cell in reasons)


def test_the_documents_show_the_table() -> None:
    document = table.README.read_text()
    assert table.with_table(document, table.format_table(table.read())) == document
    assert table.RECIPES.read_text() == table.format_recipes()


@every_row
def test_recipes_call_what_diffusers_has(row: Row) -> None:
    pipeline = getattr(diffusers, row.pipeline)
    assert isinstance(row.make(), pipeline)
    tree = ast.parse(row.recipe.code(row.pipeline))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for node in calls:
        if isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "diffusers":
            assert hasattr(diffusers, node.func.attr)
    (call,) = (node for node in calls if ast.unparse(node.func) == "fast_pipe")
    given = {keyword.arg: None for keyword in call.keywords}
    inspect.signature(pipeline.__call__).bind(None, *call.args, **given)
    asked = inspect.signature(pipeline.__init__).parameters
    (load,) = (
        node for node in calls if ast.unparse(node.func).endswith(f"{row.pipeline}.from_pretrained")
    )
    assert {keyword.arg for keyword in load.keywords} - {"torch_dtype"} <= set(asked)
