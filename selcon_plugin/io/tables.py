r"""CSV tables that are safe to open in a spreadsheet and are read back exactly.

A spreadsheet runs a cell that begins with ``=``, ``+``, ``-`` or ``@`` as a formula, and
file and camera names come from whoever wrote the images. In a cell of text

1. control characters and bytes that are not UTF-8 are written as ``\x1b`` or ``\udce9``,
   and a backslash as ``\\``;
2. an apostrophe precedes a text that begins with one of the characters above, with a blank
   or with an apostrophe.

Numbers are written as they are. :func:`read_table` undoes both steps.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from selcon_plugin.io.atomic import write_atomically
from selcon_plugin.io.names import escape, unescape

Cell = str | int | float | None

# The wide forms are formulas in some languages; blanks are skipped before a formula.
_GUARDED = tuple("=+-@\uff1d\uff0b\uff0d\uff20' \t\r\n")
_QUOTED = frozenset(',;"\t')


def safe_cell(value: Cell) -> str:
    r"""Write a value such that no spreadsheet takes it for a formula.

    Args:
        value: Text, or a number, which is written as it is; None for an empty cell.

    Returns:
        The text of the cell.

    Example:
        >>> print(safe_cell("=1+1"), safe_cell(-1), safe_cell("door"))
        '=1+1 -1 door
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        return str(value)
    text = escape(value)
    return f"'{text}" if text.startswith(_GUARDED) else text


def plain_cell(text: str) -> str:
    """Return the text that :func:`safe_cell` was given.

    Args:
        text: Text of a cell.

    Returns:
        The value as text.
    """
    return unescape(text.removeprefix("'"))


def write_table(
    file: str | Path, columns: Sequence[str], rows: Iterable[Iterable[Cell]]
) -> None:
    """Write a CSV file with a line of column names.

    Args:
        file: File to write or replace.
        columns: Names of the columns.
        rows: Values of each line, in the order of the columns.
    """
    lines = (",".join(_quoted(safe_cell(value)) for value in row) for row in rows)
    text = "\n".join([",".join(_quoted(safe_cell(name)) for name in columns), *lines])
    write_atomically(f"{text}\n", file)


def read_table(file: str | Path) -> list[dict[str, str]]:
    """Read a file of :func:`write_table`.

    Args:
        file: The file.

    Returns:
        Text of each line's cells by column.

    Raises:
        ValueError: If the file is not UTF-8, or a line has more or fewer cells.
    """
    try:
        content = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a table of selcon: {error}") from error
    lines = list(csv.reader(io.StringIO(content, newline="")))
    columns = [plain_cell(name) for name in lines[0]] if lines else []
    for number, line in enumerate(lines, start=1):
        if len(line) != len(columns):
            raise ValueError(
                f"{file}, line {number}: {len(line)} cells, but {len(columns)} columns"
            )
    return [dict(zip(columns, map(plain_cell, line), strict=True)) for line in lines[1:]]


def _quoted(text: str) -> str:
    # Also where a semicolon or tab separates the cells, as in many languages' settings.
    if _QUOTED.isdisjoint(text):
        return text
    return '"' + text.replace('"', '""') + '"'
