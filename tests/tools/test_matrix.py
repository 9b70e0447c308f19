"""The matrix of Python and torch: its plan, its table, and rows that fail."""

import importlib.util
import json
import subprocess
import sys

import pytest

from helpers.hosts import ROOT

SPEC = importlib.util.spec_from_file_location("matrix", ROOT / "tools" / "matrix.py")
matrix = importlib.util.module_from_spec(SPEC)
sys.modules["matrix"] = matrix
SPEC.loader.exec_module(matrix)

OLD, NEW = (3, 10), (3, 13)


def test_oldest_and_newest_are_combined():
    rows = matrix.plan({OLD: "old", (3, 11): "mid", NEW: "new"})
    assert [(row.name, row.python) for row in rows] == [
        ("oldest", "old"),
        ("oldest-python", "old"),
        ("newest", "new"),
    ]
    assert rows[0].torch == matrix.OLDEST_TORCH
    assert {rows[1].torch, rows[2].torch} == {matrix.NEWEST_TORCH}


def test_this_machine_has_a_python():
    assert max(matrix.pythons()) >= OLD


class Commands:
    """Replacement of subprocess.run, which fails where a word is in the command."""

    def __init__(self, fails=""):
        self.fails, self.seen = fails, []

    def __call__(self, command, **options):
        self.seen.append(command)
        versions = dict.fromkeys(matrix.SHOWN, "1.0")
        words = " ".join(map(str, command[1:]))
        status = int(bool(self.fails) and words.startswith(self.fails))
        output = json.dumps({"versions": versions})
        return subprocess.CompletedProcess(command, status, output, "")


@pytest.mark.parametrize(
    ("fails", "expected", "status"),
    [
        ("", {"doctor": "ok", "demo": "ok", "tests": "ok"}, 0),
        ("-m selcon_plugin demo", {"doctor": "ok", "demo": "failed", "tests": "ok"}, 1),
        ("-m pytest", {"doctor": "ok", "demo": "ok", "tests": "failed"}, 1),
        ("-m selcon_plugin doctor", {"doctor": "rc 1", "demo": "ok", "tests": "ok"}, 1),
        ("-m pip install --upgrade", {}, 1),
    ],
)
def test_rows_run_unattended_and_a_failure_is_the_exit_status(
    monkeypatch, tmp_path, capsys, fails, expected, status
):
    commands = Commands(fails)
    monkeypatch.setattr(matrix.subprocess, "run", commands)
    monkeypatch.setattr(matrix, "pythons", lambda: {OLD: "old", NEW: "new"})
    monkeypatch.setattr(matrix, "cpu_index", list)
    assert matrix.main(["--folder", str(tmp_path), "--only", "newest"]) == status
    written = (tmp_path / "matrix.md").read_text()
    assert written in capsys.readouterr().out
    cells = dict(
        zip(matrix.COLUMNS, map(str.strip, written.splitlines()[2].split("|")[1:]))  # noqa: B905
    )
    steps = {name: cells[name] for name in ("doctor", "demo", "tests")}
    assert steps == {"doctor": "-", "demo": "-", "tests": "-"} | expected
    assert not (tmp_path / "newest" / "venv").exists()


def test_missing_python_fails_the_rows_that_need_it(monkeypatch, tmp_path):
    monkeypatch.setattr(matrix.subprocess, "run", Commands())
    monkeypatch.setattr(matrix, "pythons", lambda: {NEW: "new"})
    monkeypatch.setattr(matrix, "cpu_index", list)
    assert matrix.main(["--folder", str(tmp_path)]) == 1
    rows = (tmp_path / "matrix.md").read_text().splitlines()[2:]
    assert [row.count("| - ") for row in rows] == [8, 8, 0]
