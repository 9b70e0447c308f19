import csv

import pytest

from selcon_plugin.io.tables import plain_cell, read_table, safe_cell, write_table

TEXTS = [
    "=cmd|' /C calc'!A0",
    "+1",
    "-door",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    "\n=1",
    " =1",
    "'quoted",
    "\uff1d1+1",
    "a;=1",
    'say "hi", =1',
    "two\nlines",
    "M\udcfc",
    "a\\x41",
    "\x1b[2J",
    "",
    "door",
]


@pytest.mark.parametrize("text", TEXTS)
def test_cells_are_no_formulas_and_are_read_back(text):
    cell = safe_cell(text)
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n", " ", "\uff1d"))
    assert plain_cell(cell) == text


def test_table_is_read_back_line_by_line(tmp_path):
    file = tmp_path / "table.csv"
    write_table(file, ["name", "number"], [(text, -1) for text in TEXTS])
    assert read_table(file) == [{"name": text, "number": "-1"} for text in TEXTS]
    assert len(file.read_bytes().splitlines()) == 1 + len(TEXTS)
    with open(file, encoding="utf-8", newline="") as stream:
        plain = list(csv.DictReader(stream))
    assert [row["number"] for row in plain] == ["-1"] * len(TEXTS)
    assert '"a;=1"' in file.read_text()  # one cell also where semicolons separate cells


def test_other_files_are_refused(tmp_path):
    file = tmp_path / "table.csv"
    file.write_bytes(b"a,b\n\xe9,1\n")
    with pytest.raises(ValueError, match=r"table\.csv"):
        read_table(file)
    file.write_text("a,b\n1\n")
    with pytest.raises(ValueError, match=r"line 2"):
        read_table(file)
