"""Tables in Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from policy.common.terminal import printable


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, align: str = "") -> str:
    """Lay out a table in Markdown.

    Args:
        heads: one for each column.
        rows: cells, one for each column; a `|` in a cell is escaped, and a line break becomes a space.
        align: a letter for each column, `l` for left and `r` for right, pads the cells so that columns line up in a
            terminal; without any, cells stay as they are.

    Returns:
        The table, without a line break at its end.

    Raises:
        ValueError: a row, or `align`, has more or fewer columns than there are heads, or `align` has another letter.
    """
    if wrong := [row for row in rows if len(row) != len(heads)]:
        raise ValueError(f"a row has {len(wrong[0])} cells, the table {len(heads)} columns: {list(wrong[0])}")
    if align and (len(align) != len(heads) or not set(align) <= set("lr")):
        raise ValueError(f"align must be l or r for each of {len(heads)} columns, or empty; got {align!r}")
    cells = [[" ".join(cell.splitlines()).replace("|", "\\|") for cell in line] for line in (heads, *rows)]
    columns = map(_column, zip(*cells, strict=True), align or " " * len(heads))
    return "\n".join("| " + " | ".join(line) + " |" for line in zip(*columns, strict=True))


def markdown_text(text: str) -> str:
    r"""Write a text so that Markdown shows it as it stands: no link, picture, emphasis or HTML comes of it.

    >>> print(markdown_text("[a](b) <i> _c_ https://d"))
    \[a\](b) &lt;i> \_c\_ https:&#47;/d
    """
    line = " ".join(printable(text).split())
    line = re.sub(r"([\\`*_~\[\]])", r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;"))
    return re.sub(r"(?<=:)/|(?<=www)\.|@", lambda found: f"&#{ord(found[0])};", line)  # no bare address


def markdown_code(text: str) -> str:
    """Write a text as code; a backtick in it, which would end the code, becomes an apostrophe."""
    return f"`{' '.join(printable(text).split()).replace('`', chr(39))}`"


def _column(cells: Sequence[str], align: str) -> list[str]:
    """A column with its rule below the head. The shortest rules that Markdown accepts are `-` and `-:`."""
    if align == "l":
        width = max(1, *map(len, cells))
        padded, rule = [cell.ljust(width) for cell in cells], "-" * width
    elif align == "r":
        width = max(2, *map(len, cells))
        padded, rule = [cell.rjust(width) for cell in cells], "-" * (width - 1) + ":"
    else:
        padded, rule = list(cells), "---"
    return [padded[0], rule, *padded[1:]]
