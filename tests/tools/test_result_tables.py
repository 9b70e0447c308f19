"""Results are kept once: tables are generated, and no sentence repeats a main number."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location(
    "result_tables", ROOT / "tools/result_tables.py"
)
result_tables = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(result_tables)

RESULTS = {
    "study": {
        "caption": "Two runs.",
        "tables": {
            "main": {
                "columns": {"method": "", "mAP": ".1f", "images": "d"},
                "rows": [
                    {
                        "id": "a",
                        "method": "[A](docs/a.md)",
                        "mAP": [90.0, 0.25],
                        "images": 5,
                    },
                    {"id": "b", "method": "B", "mAP": 41.5, "images": None},
                    {"method": "12.5 / 30.0 ¹", "mAP": None, "images": None},
                ],
            }
        },
    }
}


def test_pages_are_up_to_date_and_repeat_nothing(capsys):
    assert result_tables.main(["--check"]) == 0, capsys.readouterr().out


def test_table_has_formats_chosen_columns_rows_and_relative_links():
    table = result_tables.render("study/main", RESULTS, Path("docs/methods"))
    assert table.splitlines()[:3] == [
        "| method | mAP | images |",
        "| --- | --- | --- |",
        "| [A](../a.md) | 90.0 ± 0.2 | 5 |",
    ]
    chosen = result_tables.render("study/main | mAP, method | b", RESULTS, Path())
    assert chosen.splitlines()[2:] == ["| 41.5 | B |"]
    assert result_tables.render("study/caption", RESULTS, Path()) == "Two runs."


@pytest.mark.parametrize(
    "view",
    ["study", "other/main", "study/other", "study/main | x", "study/main | mAP | c"],
)
def test_view_of_what_is_not_there_is_refused(view):
    with pytest.raises(ValueError, match=re.escape(repr(view))):
        result_tables.render(view, RESULTS, Path())


def test_blocks_are_filled_and_filling_again_changes_nothing():
    page = "Before.\n<!-- results: study/caption -->\n<!-- results: end -->\nAfter.\n"
    filled = result_tables.fill(page, RESULTS, Path())
    assert filled.splitlines()[2:4] == ["", "Two runs."][:2]
    assert filled.endswith("<!-- results: end -->\nAfter.\n")
    assert result_tables.fill(filled, RESULTS, Path()) == filled


@pytest.mark.parametrize(
    ("sentence", "number"),
    [
        ("It reaches 41.5 mAP.", "41.5 mAP"),
        ("It has 41.5 / 60.0.", "41.5 / "),
        ("90.0 ± 0.2 on average", "90.0 ± 0.2"),
        ("that is 12.5 / 30.0", "12.5 / 30.0"),
    ],
)
def test_repeated_number_is_found_outside_of_blocks_only(sentence, number):
    numbers = result_tables.main_numbers(RESULTS)
    page = f"One.\n{sentence}\n"
    assert list(result_tables.repeated(page, numbers)) == [(2, number)]
    block = f"<!-- results: study/main -->\n{sentence}\n<!-- results: end -->\n"
    assert not list(result_tables.repeated(block, numbers))
    assert not list(result_tables.repeated("141.5 mAP, 41.5 s", numbers))


def test_stale_page_is_named_and_then_written(tmp_path, monkeypatch, capsys):
    folder = tmp_path / result_tables.RESULTS
    folder.mkdir(parents=True)
    (folder / "study.yml").write_text('caption: "Two runs."\ntables: {}\n')
    page = tmp_path / "README.md"
    page.write_text("<!-- results: study/caption -->\n<!-- results: end -->\n")
    monkeypatch.setattr(result_tables, "ROOT", tmp_path)
    assert result_tables.main(["--check"]) == 1
    assert "README.md: stale" in capsys.readouterr().out
    assert result_tables.main([]) == 0
    assert "Two runs." in page.read_text()
    assert result_tables.main(["--check"]) == 0


def test_every_result_names_command_machine_and_commit():
    for name, content in result_tables.load_results().items():
        assert content["command"], name
        assert content["machine"], name
        assert "commit" in content, name


def test_numbers_of_reliability_are_those_of_their_pages():
    rows = result_tables.load_results()["reliability"]["tables"]["trust"]["rows"]
    for row in rows:
        page = ROOT / re.search(r"\((docs/[^)]+)\)", row["check"])[1]
        for number in re.findall(r"\d+", row["result"]):
            assert re.search(rf"(?<!\d){number}(?!\d)", page.read_text()), (page, number)
