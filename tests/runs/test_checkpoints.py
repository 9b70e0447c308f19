"""Broken and foreign checkpoints are refused by name, or skipped if others exist."""

import logging
import os
import pickle

import pytest
import torch

from selcon_plugin.io.atomic import save_atomically
from selcon_plugin.runs.checkpoints import (
    BadCheckpointError,
    first_readable,
    newest_first,
    read_checkpoint,
)

REQUIRED = ("model", "epoch")
WHOLE = {"model": {"weight": torch.arange(2000.0)}, "epoch": 3}


class Payload:
    """Object that creates a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (os.mkdir, (str(self.file),))


@pytest.fixture
def whole(tmp_path):
    file = tmp_path / "whole.pth"
    save_atomically(WHOLE, file)
    return file


def test_complete_checkpoint_is_read(whole):
    loaded = read_checkpoint(whole, REQUIRED)
    assert loaded["epoch"] == 3
    assert torch.equal(loaded["model"]["weight"], WHOLE["model"]["weight"])


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.01, 0.3, 0.7, 0.99, 0.9999])
def test_truncated_checkpoint_is_refused_wherever_it_ends(whole, fraction):
    os.truncate(whole, int(fraction * whole.stat().st_size))
    with pytest.raises(BadCheckpointError, match=r"whole\.pth"):
        read_checkpoint(whole, REQUIRED)


def test_zeros_in_place_of_the_end_are_refused(whole):
    """Some file systems leave such files after a power failure."""
    size = whole.stat().st_size
    os.truncate(whole, size // 2)
    os.truncate(whole, size)
    with pytest.raises(BadCheckpointError, match=r"whole\.pth"):
        read_checkpoint(whole, REQUIRED)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"\0" * 4096, "cannot be read"),
        (b"accuracy: 97.2\n" * 50, "cannot be read"),
        (b"PK\x03\x04 not a zip file", "cannot be read"),
        (pickle.dumps([1, 2]), "cannot be read|no model, epoch"),
    ],
)
def test_foreign_file_is_refused(tmp_path, content, reason):
    file = tmp_path / "foreign.pth"
    file.write_bytes(content)
    with pytest.raises(BadCheckpointError, match=rf"foreign\.pth.*({reason})"):
        read_checkpoint(file, REQUIRED)


@pytest.mark.parametrize("content", [torch.zeros(3), {"model": {}}, [1]])
def test_entries_that_are_missing_are_named(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(BadCheckpointError, match=r"weights\.pth is not .*no .*epoch"):
        read_checkpoint(tmp_path / "weights.pth", REQUIRED)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    mark = tmp_path / "was here"
    torch.save({**WHOLE, "payload": Payload(mark)}, tmp_path / "bad.pth")
    with pytest.raises(BadCheckpointError, match=r"bad\.pth cannot be read"):
        read_checkpoint(tmp_path / "bad.pth", REQUIRED)
    assert not mark.exists()


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "missing.pth")
    with pytest.raises(BadCheckpointError):
        read_checkpoint(tmp_path)


def test_previous_checkpoint_replaces_a_broken_one_with_a_warning(whole, tmp_path, caplog):
    cut, text = tmp_path / "cut.pth", tmp_path / "text.pth"
    cut.write_bytes(whole.read_bytes()[:-100])
    text.write_text("x")
    with caplog.at_level(logging.WARNING):
        file, checkpoint = first_readable([cut, text, whole], REQUIRED)
    assert file == whole
    assert checkpoint["epoch"] == 3
    assert [name for name in ("cut.pth", "text.pth") if name in caplog.text] == [
        "cut.pth",
        "text.pth",
    ]
    assert f"Resuming from {whole}" in caplog.text
    with pytest.raises(BadCheckpointError, match=r"cut\.pth.*text\.pth.*start over"):
        first_readable([cut, text], REQUIRED)


def test_newest_first_goes_by_time(tmp_path):
    files = [tmp_path / name for name in ("b", "a", "c")]
    for time, file in enumerate(files):
        file.write_text("")
        os.utime(file, (time, time))
    assert [file.name for file in newest_first(files)] == ["c", "a", "b"]
