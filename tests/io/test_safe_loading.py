"""Tensor files from anywhere: data only, and no more of it than the file has."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import torch

from selcon_plugin.io.safe_loading import data_only, load_data
from selcon_plugin.models.pretrained import read_state_dict
from selcon_plugin.runs.checkpoints import BadCheckpointError, read_checkpoint

CONTENT = {"model": {"w": torch.zeros(200_000)}}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    file = tmp_path / "weights.pth"
    torch.save(CONTENT, file)
    return file


@pytest.fixture
def bomb(saved: Path) -> Path:
    """The same archive, compressed: 800 KB of zeros in 1 KB."""
    file = saved.with_name("bomb.pth")
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(file, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry), zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 5000
    return file


@pytest.fixture
def overlapping(saved: Path) -> Path:
    """An archive whose directory has the same bytes a hundred times."""
    file = saved.with_name("overlapping.pth")
    file.write_bytes(saved.read_bytes())
    with zipfile.ZipFile(file, "a") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        archive.filelist.extend([largest] * 100)
        archive.writestr("more", "")  # so that the directory is written
    return file


@pytest.mark.parametrize("name", ["bomb", "overlapping"])
def test_archive_that_expands_is_refused_before_it_is_read(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = request.getfixturevalue(name)
    monkeypatch.setattr("selcon_plugin.io.safe_loading._torch_load", pytest.fail)
    size = f"{file.stat().st_size:,}"
    for read in (load_data, read_state_dict):
        with pytest.raises(ValueError, match=rf"{name}\.pth expands from {size} to"):
            read(file)
    with pytest.raises(BadCheckpointError, match=r"expands from .* torch\.save"):
        read_checkpoint(file)
    with data_only(), pytest.raises(ValueError, match="expands from"):
        torch.load(file)
    with pytest.raises(ValueError, match="expands from"):
        load_data(io.BytesIO(file.read_bytes()))


@pytest.mark.parametrize("new", [True, False])
def test_file_of_either_format_is_read(new: bool, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(CONTENT, file, _use_new_zipfile_serialization=new)
    assert torch.equal(load_data(file)["model"]["w"], CONTENT["model"]["w"])
    with file.open("rb") as stream:
        assert torch.equal(load_data(stream)["model"]["w"], CONTENT["model"]["w"])


def test_empty_tensors_are_read(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"w": torch.zeros(0), "n": 3}, file)
    assert load_data(file)["w"].shape == (0,)
