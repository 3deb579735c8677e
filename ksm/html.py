"""Tables as HTML, for notebooks: everything that came from outside escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table whose first column is of names, at the left, and whose others are of figures, at the right.

    >>> table(["name", "pages"], [["<b>", "1"]])[-70:-24]
    '&lt;b&gt;</th><td style="text-align:right">1</'
    """
    left, right = 'style="text-align:left"', 'style="text-align:right"'
    head = "".join(f'<th scope="col" {left if n == 0 else right}>{escape(name)}</th>' for n, name in enumerate(columns))
    body = "".join(
        f'<tr><th scope="row" {left}>{escape(str(row[0]))}</th>'
        + "".join(f"<td {right}>{escape(str(cell))}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    said = f'<caption style="text-align:left">{escape(caption)}</caption>' if caption else ""
    return f"<table>{said}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
