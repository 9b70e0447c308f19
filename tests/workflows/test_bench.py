"""Tests of the bench around its runs: names, messages and locks, without training."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from selcon_plugin.cli.bench import main
from selcon_plugin.workflows import bench_runs
from selcon_plugin.workflows.bench import row_names
from selcon_plugin.workflows.bench_runs import failure
from selcon_plugin.workflows.bench_table import Run

# --- names and messages -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["scl.yml", "cc.yaml"], ["scl", "cc"]),
        (["a/mine.yml", "b/mine.yml", "b/cc.yml"], ["a/mine", "b/mine", "cc"]),
        (["x/a/m.yml", "y/a/m.yml", "y/b/m.yml"], ["x/a/m", "y/a/m", "b/m"]),
    ],
)
def test_names_of_rows(files, names):
    assert row_names(files) == names


def test_files_that_differ_only_in_their_suffix_keep_it_in_their_names(tmp_path):
    names = row_names([str(tmp_path / "m.yml"), str(tmp_path / "m.yaml")])
    assert names == ["m.yml", "m.yaml"]


def test_file_given_twice_is_refused():
    with pytest.raises(ValueError, match=r"a\.yml is given twice"):
        row_names(["a.yml", "./a.yml"])


def test_failure_describes_the_reason():
    console = "Traceback ...\n  File\nValueError: no images\n\n"
    assert failure(1, console) == "exit status 1: ValueError: no images"
    assert failure(2, "") == "exit status 2: it printed nothing"
    assert failure(-9, console) == "ended by SIGKILL; out of memory?"
    assert failure(-15, console) == "ended by SIGTERM"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--configs", "a.yml", "--seeds", "0"], "--seeds .*1.*got 0"),
        (["--configs", "a.yml", "--epochs", "0"], "--epochs .*1.*got 0"),
        (["--configs", "SOLVER.BASE_LR", "1.0"], "--configs needs .yml files, got 'SOLVER"),
    ],
)
def test_wrong_arguments_are_refused_before_any_config_is_read(arguments, message):
    with pytest.raises(ValueError, match=message):
        main(arguments)


# --- one run at a time --------------------------------------------------------------------


def test_a_folder_that_is_in_use_is_waited_for(tmp_path, capsys):
    descriptor = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    closing = threading.Timer(0.3, os.close, [descriptor])
    closing.start()
    started = time.monotonic()
    (tmp_path / "results.json").write_text('{"metrics": {}}')
    bench_runs.finish(Run("scl", 0, tmp_path), "scl")
    assert time.monotonic() - started > 0.2
    closing.join()
    assert "another process trains in" in capsys.readouterr().out
    bench_runs.finish(Run("scl", 0, tmp_path), "scl")
    assert "another process" not in capsys.readouterr().out


KILLED_BENCH = """
import sys
from pathlib import Path
from selcon_plugin.workflows import bench_runs
from selcon_plugin.workflows.bench_table import Run

child = (
    "import pathlib, time; pathlib.Path('begun').touch(); time.sleep(1.5);"
    "pathlib.Path('results.json').write_text('{\\"metrics\\": {}}')"
)
bench_runs._command = lambda run: [sys.executable, "-c", child]
run = Run("scl", 0, Path("."), {"SOLVER.MAX_EPOCH": 1}, "fastreid")
bench_runs.finish(run, "scl seed 0")
"""


def test_run_of_a_killed_bench_is_waited_for_and_read(tmp_path, monkeypatch, capsys):
    pytest.importorskip("selcon_plugin.fastreid_ext")
    root = str(Path(bench_runs.__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_BENCH],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "results.json").exists()

    def begin_another(_run):
        raise AssertionError("a second process began in the same folder")

    monkeypatch.setattr(bench_runs, "_command", begin_another)
    outcome = bench_runs.finish(Run("scl", 0, tmp_path), "scl seed 0")
    assert outcome.record == {"metrics": {}}
    assert "finished earlier" in capsys.readouterr().out
