"""Draws tables as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def draw_table(
    rows: Sequence[Sequence[str]], header: Sequence[str] = (), best: str | None = None
) -> str:
    """Returns a table; the row that begins with `best` stands out."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f'<tr class="{"best" if row[0] == best else "plain"}">'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
