"""Tests share modules made for that, so that each test file can be read, moved and run alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")])
IMPORT = re.compile(r"^\s*(?:from|import) +(?:tests\.)?(test_\w+|conftest)\b", re.MULTILINE)
"""Imports in the text of a script that a test runs count as well."""


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_no_file_imports_a_test_file_or_conftest(file: Path) -> None:
    assert not IMPORT.findall(file.read_text())
