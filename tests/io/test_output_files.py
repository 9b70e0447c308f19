"""Output that would replace an input, or a file of another kind, is refused."""

import os

import pytest

from selcon_plugin.cli.main import main
from selcon_plugin.inference.export import export_onnx, export_torchscript
from selcon_plugin.io.atomic import FileWriteError, write_atomically
from selcon_plugin.io.output_files import (
    check_output_apart,
    check_output_file,
    check_output_folder,
)
from selcon_plugin.report import write_comparison, write_report
from selcon_plugin.retrieval.page import write_page


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model.pth", "photo.jpg", "config.yaml", "results.json"):
        (tmp_path / name).write_text("the only one")
    (tmp_path / "link.npz").symlink_to("model.pth")
    return tmp_path


def check(file, *inputs):
    check_output_file(file, name="--output", kinds=(".npz",), inputs=inputs)


def test_new_files_and_earlier_output_are_accepted(folder):
    for file in ("f.NPZ", "features"):
        (folder / file).write_text("earlier")
    for file in ("f.NPZ", "features", "new.jpg", "no/folder/f"):
        check(file, "", "model.pth", "missing.pth")


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("photo.jpg", "not a .npz file"),
        ("model.pth", "is a file that is read"),
        ("link.npz", "is a file that is read"),
        (".", "is a folder"),
        ("/dev/null", "a device"),
    ],
)
def test_the_file_of_another_is_refused(folder, file, part):
    with pytest.raises(ValueError, match=part) as caught:
        check(file, "model.pth")
    assert str(caught.value).startswith(f"--output {file} ")


def test_the_folder_of_the_network_is_refused(folder):
    check_output_apart("other", "model.pth", name="--output")
    with pytest.raises(ValueError, match=r"--output \. is the folder of model\.pth"):
        check_output_apart(".", "model.pth", name="--output")


@pytest.mark.parametrize(
    "arguments",
    [
        "extract --weights model.pth --images . --output model.pth",
        "extract --weights model.pth --images . --output photo.jpg",
        "extract --onnx model.pth --images . --output model.pth",
        "export --weights model.pth --onnx model.pth",
        "export --weights model.pth --torchscript model.pth",
        "export --weights model.pth --onnx net --torchscript ./net",
        "export --weights model.pth --fastreid .",
        "export --weights model.pth --torchreid ../" + "{name}",
        "adapt --weights model.pth --images . --output .",
        "search --index . photo.jpg --html photo.jpg",
        "search --index . photo.jpg --html config.yaml",
        "report . --output results.json",
    ],
)
def test_no_command_replaces_its_input(folder, arguments, capsys):
    assert main(arguments.format(name=folder.name).split()) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "choose another" in said or "its own file" in said
    content = {file.read_text() for file in folder.iterdir()}
    assert content == {"the only one"}


@pytest.mark.parametrize("place", ["photo.jpg", "photo.jpg/x", "/proc/x"])
@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        ("--output", "index --weights model.pth --images ."),
        ("--output", "cluster --weights model.pth --images ."),
        ("--output", "adapt --weights model.pth --images ."),
        ("--output", "bench --configs SyntheticPersons/scl.yml"),
        ("--output", "config --copy SyntheticPersons/scl.yml"),
        ("--output", "demo"),
        ("--fastreid", "export --weights model.pth"),
        ("--torchreid", "export --weights model.pth"),
    ],
)
def test_folders_that_cannot_be_written(folder, arguments, option, place, capsys):
    pytest.importorskip("fastreid", exc_type=ImportError)
    assert main([*arguments.split(), option, place]) == 2
    said = capsys.readouterr().err
    assert f"error: {option} {place!r} is not a writable folder" in said
    assert "Use another one" in said
    assert {file.read_text() for file in folder.iterdir()} == {"the only one"}


@pytest.mark.parametrize("folder_of_file", ["photo.jpg", "/proc"])
@pytest.mark.parametrize(
    ("option", "end", "arguments"),
    [
        ("--output", ".npz", "extract --weights model.pth --images ."),
        ("--html", ".html", "search --index . photo.jpg"),
        ("--output", ".html", "report ."),
        ("--output", ".html", "report . other"),
        ("--onnx", ".onnx", "export --weights model.pth"),
        ("--torchscript", ".pt", "export --weights model.pth"),
    ],
)
def test_files_that_cannot_be_written(
    folder, arguments, option, end, folder_of_file, capsys
):
    file = f"{folder_of_file}/new{end}"
    assert main([*arguments.split(), option, file]) == 2
    said = capsys.readouterr().err
    assert f"error: {option} {file}: {folder_of_file!r} is not a writable folder" in said
    assert "Choose another place" in said


def test_a_folder_is_checked_without_a_change(folder):
    assert check_output_folder("--output", "new/folder") == "new/folder"
    assert not (folder / "new").exists()
    with pytest.raises(ValueError, match="OUTPUT_DIR is empty"):
        check_output_folder("OUTPUT_DIR", "")


def test_nor_does_the_python_api(folder):
    for write in (
        lambda: export_onnx(None, "model.pth", crops=[]),
        lambda: export_torchscript(None, "photo.jpg", crops=[]),
        lambda: write_page("photo.jpg", []),
        lambda: write_report(".", "results.json"),
        lambda: write_comparison([".", "a"], "results.json"),
    ):
        with pytest.raises(ValueError, match="choose another name"):
            write()


@pytest.mark.parametrize("kind", ["pipe", "link to a device"])
def test_devices_and_pipes_are_not_replaced(tmp_path, kind):
    """The administrator's rename would replace even /dev/null."""
    file = tmp_path / "out"
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to(os.devnull)
    with pytest.raises(FileWriteError, match="Choose the name of a file"):
        write_atomically("text", file)
    assert not file.is_file()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
