"""Folders with file names as in Market-1501."""

import pytest

from selcon_plugin.datasets import read_market_folder, read_market_splits


def test_splits_are_read_from_their_folders(tmp_path):
    names = {
        "bounding_box_train": ["0002_c1s1_000451_03.jpg", "-1_c6s1_000001_00.png"],
        "query": ["0007_c3s1_000001_00.jpg"],
        "bounding_box_test": ["0000_c2s1_000001_00.jpg", "0007_c1s1_000001_00.jpg"],
    }
    for split, files in names.items():
        (tmp_path / split).mkdir()
        for file in files:
            (tmp_path / split / file).touch()
    splits = read_market_splits(tmp_path)
    assert splits.train == [
        (str(tmp_path / "bounding_box_train" / "-1_c6s1_000001_00.png"), -1, 5),
        (str(tmp_path / "bounding_box_train" / "0002_c1s1_000451_03.jpg"), 2, 0),
    ]
    assert [entry[1:] for entry in splits.query] == [(7, 2)]
    assert [entry[1:] for entry in splits.gallery] == [(0, 1), (7, 0)]


def test_missing_split_is_named(tmp_path):
    for split in ("bounding_box_train", "query"):
        (tmp_path / split).mkdir()
    with pytest.raises(FileNotFoundError, match="bounding_box_test"):
        read_market_splits(tmp_path)


def test_names_without_identity_and_camera_are_refused(tmp_path, caplog):
    (tmp_path / "notes.txt").touch()
    assert read_market_folder(tmp_path) == []
    assert "notes.txt is not an image" in caplog.text
    (tmp_path / "0001_c0s1.jpg").touch()  # cameras count from 1
    with pytest.raises(ValueError, match=r"0001_c0s1\.jpg: expected a name like"):
        read_market_folder(tmp_path)


def test_resource_forks_of_macos_are_skipped(tmp_path):
    (tmp_path / "0002_c1s1_000451_03.jpg").touch()
    (tmp_path / "._0002_c1s1_000451_03.jpg").touch()
    assert len(read_market_folder(tmp_path)) == 1
