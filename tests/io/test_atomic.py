"""Atomic writes: files are complete or absent."""

import os

import pytest
import torch

from selcon_plugin.io.atomic import (
    remove_partial_files,
    replacing,
    save_atomically,
    write_atomically,
)


def test_saved_data_is_read_back(tmp_path):
    save_atomically({"bank": torch.arange(3)}, tmp_path / "a.pth")
    write_atomically("a.pth", tmp_path / "last")
    loaded = torch.load(tmp_path / "a.pth", weights_only=True)
    assert torch.equal(loaded["bank"], torch.arange(3))
    assert (tmp_path / "last").read_text() == "a.pth"
    assert {file.name for file in tmp_path.iterdir()} == {"a.pth", "last"}


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_failure_leaves_the_earlier_file_and_nothing_else(tmp_path, monkeypatch, where):
    file = tmp_path / "a.txt"
    write_atomically("earlier", file)

    def fail(*_):
        raise OSError("no space left on device")

    def write():
        with replacing(file) as stream:
            stream.write(b"half")
            if where == "write":
                fail()

    if where != "write":
        monkeypatch.setattr(os, where, fail)
    with pytest.raises(OSError, match="no space"):
        write()
    assert [f.name for f in tmp_path.iterdir()] == ["a.txt"]
    assert file.read_text() == "earlier"


def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path, monkeypatch
):
    events = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor):
        kind = "folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"
        events.append(f"fsync {kind}")
        fsync(descriptor)

    def noted_replace(*names):
        events.append("replace")
        replace(*names)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_atomically("text", tmp_path / "a.txt")
    assert events == ["fsync file", "replace", "fsync folder"]


def test_partial_files_are_removed_and_others_stay(tmp_path):
    for name in ("model_0001.pth.partial", "model_0001.pth", "last_checkpoint"):
        (tmp_path / name).write_text("x")
    (tmp_path / "folder.partial").mkdir()
    remove_partial_files(tmp_path)
    remove_partial_files(tmp_path / "missing")
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {"model_0001.pth", "last_checkpoint", "folder.partial"}
