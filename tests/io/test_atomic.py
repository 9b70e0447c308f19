"""Atomic writes: files are complete or absent."""

import contextlib
import errno
import os
import pickle
import resource

import numpy as np
import pytest
import torch

from selcon_plugin.io.atomic import (
    FileWriteError,
    make_folder,
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


@contextlib.contextmanager
def small_files(most):
    """Let the system refuse to write files beyond a size, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", ["torch", "npz", "npy", "text"])
def test_full_disk_is_named_and_leaves_no_half_file(tmp_path, kind):
    file = tmp_path / "a.bin"
    write_atomically("earlier", file)
    large = np.arange(5000.0)

    def write():
        with replacing(file) as stream:
            if kind == "torch":
                torch.save({"a": torch.from_numpy(large)}, stream)
            elif kind == "npz":
                np.savez(stream, a=large)
            elif kind == "npy":
                np.save(stream, large)
            else:
                stream.write(large.tobytes())

    with small_files(3000), pytest.raises(FileWriteError) as failed:
        write()
    assert failed.value.errno in (errno.EFBIG, errno.ENOSPC)
    assert failed.value.filename == str(file)
    for part in (f"cannot write {file}: {failed.value.strerror}", "Free some space"):
        assert part in str(failed.value)
    assert [f.name for f in tmp_path.iterdir()] == ["a.bin"]
    assert file.read_text() == "earlier"


def test_error_of_another_file_keeps_its_name(tmp_path):
    def write():
        with replacing(tmp_path / "a.txt") as stream:
            stream.write((tmp_path / "missing.txt").read_bytes())

    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written_are_named_with_a_remedy(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for place, reason in {
        "folder": "It is a folder",
        "file/a.txt": "Part of its path is a file",
        "missing/a.txt": "create it again",
    }.items():
        with pytest.raises(FileWriteError, match=reason) as failed:
            write_atomically("text", tmp_path / place)
        assert str(tmp_path / place) in str(failed.value)
    for place in ("file", "file/below"):
        with pytest.raises(FileWriteError, match="move th") as failed:
            make_folder(tmp_path / place)
        assert f"cannot create the folder {tmp_path / place}" in str(failed.value)
    assert make_folder(tmp_path / "a" / "b").is_dir()
    assert {f.name for f in tmp_path.rglob("*")} == {"file", "folder", "a", "b"}


def test_a_link_of_the_name_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "target").write_text("precious")
    for name in ("a.txt", "a.txt.partial"):
        (tmp_path / name).symlink_to("target")
    write_atomically("text", tmp_path / "a.txt")
    assert (tmp_path / "target").read_text() == "precious"
    assert (tmp_path / "a.txt").read_text() == "text"


def test_write_error_passes_between_processes(tmp_path):
    error = FileWriteError(tmp_path / "a", OSError(errno.ENOSPC, "full"))
    assert "Free some space" in str(pickle.loads(pickle.dumps(error)))
