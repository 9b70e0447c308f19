"""The program itself: its versions and hints, and how it ends."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest

from helpers.programs import environment
from selcon_plugin import __version__
from selcon_plugin.cli import failures
from selcon_plugin.cli.failures import message_of, run_command
from selcon_plugin.cli.main import main
from selcon_plugin.config.files import builtin_configs


@pytest.mark.parametrize("word", ["--version", "-V", "version"])
def test_versions_of_package_torch_and_hosts(word, capsys):
    assert main([word]) == 0
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert line.startswith(f"selcon_plugin {__version__}, Python ")
    assert all(name in line for name in ("torch ", "fastreid ", "torchreid "))


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["trains"], "'trains'; did you mean train?"),
        (["extrakt"], "did you mean extract"),
        (["fly"], "'fly'; The commands are train, eval"),
        (["train", "--confg-file", "x"], "no option --confg-file; did you mean --config-f"),
        (["train", "--host", "fastried"], "--host; 'fastried'; did you mean fastreid?"),
        (
            ["cluster", "--images", "x", "--images", "y"],
            "--images is given twice; 'x'; 'y'",
        ),
        (["adapt", "--epochs", "10", "--epochs", "5"], "--epochs is given twice; 10; 5"),
        (["adapt", "--epochs", "1e1x"], "--epochs must be a whole number >= 1; '1e1x'"),
        (["adapt", "--epochs", "0"], "--epochs must be a whole number >= 1, got 0"),
        (["adapt", "--learning-rate", "nan"], "--learning-rate; > 0; 'nan'; finite"),
        (["index", "--output", "x"], "--images; --add; --remove; selcon index --help"),
        (["search", "--index", "x"], "IMAGE; selcon search --help"),
        (["config", "--explain", "temperatures"], "did you mean MODEL.SELCON.TEMPERATURE"),
        (["config", "--copy", "scl.yml"], "'scl.yml'; did you mean SyntheticPersons/scl"),
        (["train", "--config-file", "scl.yml"], "'scl.yml'; did you mean SyntheticPersons"),
        (["train", "SOLVER.MAX_EPOCH", "3", "--resume"], "--resume must stand before"),
        (["report", "\x1b[31m"], "\\x1b[31m"),
        (["run", "/"], "SCRIPT '/' is a folder"),
        (["cluster", "--weights", "/", "--images", "x"], "--weights '/' is a folder: name"),
        (["index", "--onnx", "/", "--images", "x", "--output", "y"], "'/' is a folder"),
        (["adapt", "--weights", "/", "--images", "x"], "--weights '/' is a folder: name a"),
        (["extract", "--weights", "/", "--images", "x", "--output", "y"], "is a folder"),
        (["cluster", "--weights", "/dev/null", "--images", "x"], "a device or a pipe"),
    ],
)
def test_mistake_is_one_line_with_a_hint(argv, parts, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    name = f"selcon {argv[0]}: error: " if len(argv) > 1 else "selcon: error: "
    assert output.err.startswith(name)
    assert [part for part in parts.split("; ") if part not in output.err] == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("host", "key"), [("fastreid", "MODEL.WEIGHTS"), ("torchreid", "model.load_weights")]
)
def test_weights_of_a_config_that_are_a_folder_are_named(host, key, capsys, tmp_path):
    pytest.importorskip(host)
    output = "OUTPUT_DIR" if host == "fastreid" else "data.save_dir"
    drawn = "SyntheticPersons" if host == "fastreid" else "syntheticpersons"
    data = (
        [
            *("DATASETS.NAMES", f"('{drawn}',)", "DATASETS.TESTS", f"('{drawn}',)"),
            *("MODEL.META_ARCHITECTURE", "SelCon"),
        ]
        if host == "fastreid"
        else ["data.sources", f"['{drawn}']", "data.targets", f"['{drawn}']"]
    )
    settings = [key, str(tmp_path), output, str(tmp_path / "out"), *data]
    assert main(["eval", "--host", host, *settings]) == 2
    assert f"{key} '{tmp_path}' is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["random", "json", "torch", "sklearn"])
def test_import_does_not_replace_a_module(name, capsys, tmp_path):
    before = sys.modules.get(name)
    (tmp_path / f"{name}.py").write_text("x = 1")
    assert main(["report", "x", "--import", str(tmp_path / f"{name}.py")]) == 2
    assert f"the name of the Python module {name}" in capsys.readouterr().err
    assert sys.modules.get(name) is before


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "a.yml"), "a.yml: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(18, "Cross-device link", "a", None, "b"), "a -> b: Cross-device link"),
        (IsADirectoryError(21, "Is a directory", "d"), "d: Is a directory"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "utf-8"),
        (MemoryError(), "memory"),
        (EOFError(), "EOFError"),
        (ValueError("two\n  lines\x1b[0m \udcff"), "two lines\\x1b[0m \\udcff"),
        (ImportError("no module"), "no module"),
        (ModuleNotFoundError("No module named 'a.b'", name="a.b"), "'a.b': install"),
        (ModuleNotFoundError("needs a: pip install a", name="a"), "needs a: pip install a"),
    ],
)
def test_errors_of_the_user_are_one_line(error, line, capsys):
    assert run_command("train", raising(error)) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("selcon train: error: ")
    assert line in printed
    assert printed.count("\n") == 1


def test_fault_of_the_program_ends_with_how_to_report_it(capsys):
    assert run_command("train", raising(KeyError("x"))) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert "KeyError" in lines[-1]
    assert "report" in lines[-1]
    assert "selcon doctor" in lines[-1]


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("SELCON_TRACEBACK", "1")
    with pytest.raises(OSError, match="gone"):
        run_command("train", raising(OSError("gone")))


def test_interruption_is_one_line(capsys):
    assert run_command("train", raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "selcon train: interrupted\n"


def test_exit_statuses_of_programs_are_kept(capsys):
    assert run_command("x", raising(SystemExit(143))) == 143
    assert run_command("x", raising(SystemExit(None))) == 0
    assert run_command("x", raising(SystemExit("gone"))) == 1
    assert capsys.readouterr().err == "gone\n"


def test_closed_streams_are_replaced(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert run_command("x", lambda: sys.stdout.write("x") and 0) == 0
    assert run_command("x", raising(ValueError("no one reads it"))) == 2
    sys.stdout.close()
    sys.stderr.close()


def test_reader_that_has_gone_leaves_no_traceback():
    program = [sys.executable, "-W", "ignore", "-m", "selcon_plugin", "--help"]
    line = f"set -o pipefail; {shlex.join(program)} | true"
    done = subprocess.run(
        ["bash", "-c", line],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 141
    assert done.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device")
def test_full_disk_is_one_line(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["config", "--list-files"]) == 2
    assert capsys.readouterr().err == "selcon config: error: No space left on device\n"


def test_broken_pipe_has_the_status_of_its_signal(monkeypatch):
    monkeypatch.setattr(failures, "_drop_output", lambda: None)
    assert run_command("x", raising(BrokenPipeError())) == 141
    assert message_of(BrokenPipeError(32, "Broken pipe")) == "Broken pipe"


def test_configs_are_listed_and_copied(capsys, tmp_path):
    assert main(["config", "--list-files"]) == 0
    assert capsys.readouterr().out.splitlines() == builtin_configs()
    folder = tmp_path / "mine"
    name = "SyntheticPersons/scl.yml"
    assert main(["config", "--copy", name, "--output", str(folder)]) == 0
    assert sorted(file.name for file in folder.iterdir()) == ["base.yml", "scl.yml"]
    assert main(["config", "--copy", name, "--output", str(folder / "scl.yml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
