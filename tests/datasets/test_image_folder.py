from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selcon_plugin.datasets import read_image_folder


def save_image(path: Path, seed: int = 0, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def cameras(folder, pattern=""):
    items = read_image_folder(folder, camera_pattern=pattern)
    return {Path(item.path).name: item.camera for item in items}


def test_finds_all_types_at_any_depth_sorted_and_nothing_else(tmp_path):
    for name in ["b.jpg", "x/y/z/a.PNG", "c.webp", "x/d.bmp", "e.jpeg"]:
        save_image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    items = read_image_folder(tmp_path)
    paths = [item.path for item in items]
    assert paths == sorted(paths)
    assert {Path(p).name for p in paths} == {"a.PNG", "b.jpg", "c.webp", "d.bmp", "e.jpeg"}


def test_first_sub_folder_is_the_camera(tmp_path):
    save_image(tmp_path / "door/monday/a.jpg")
    save_image(tmp_path / "lobby/b.jpg")
    save_image(tmp_path / "c.jpg")
    assert cameras(tmp_path) == {"a.jpg": "door", "b.jpg": "lobby", "c.jpg": None}


def test_folders_of_tracks_are_not_taken_as_cameras(tmp_path, caplog):
    for number in range(63):
        save_image(tmp_path / f"track{number % 21:02d}/{number}.jpg")
    assert set(cameras(tmp_path).values()) == {None}
    assert "21 sub-folders (track00, track01, " in caplog.text
    assert "--camera-pattern folders" in caplog.text
    caplog.clear()
    assert cameras(tmp_path, r"track(\d+)")["20.jpg"] == "20"  # chosen by the user
    assert cameras(tmp_path, "folders")["20.jpg"] == "track20"
    assert set(cameras(tmp_path, "none").values()) == {None}
    assert "sub-folders" not in caplog.text


@pytest.mark.parametrize("pattern", ["", "none"])
def test_no_structure_means_no_cameras(tmp_path, pattern):
    save_image(tmp_path / "a.jpg")
    save_image(tmp_path / "only/b.jpg")
    assert set(cameras(tmp_path, pattern).values()) == {None}


def test_none_ignores_sub_folders(tmp_path):
    save_image(tmp_path / "one/a.jpg")
    save_image(tmp_path / "two/b.jpg")
    assert set(cameras(tmp_path, "none").values()) == {None}


@pytest.mark.parametrize("pattern", [r"_c(\d)", r"c\d"])
def test_pattern_takes_first_group_or_whole_match(tmp_path, pattern):
    save_image(tmp_path / "1_c1.jpg")
    save_image(tmp_path / "1_c2.jpg")
    save_image(tmp_path / "other.jpg")
    found = cameras(tmp_path, pattern)
    assert [found["1_c1.jpg"][-1], found["1_c2.jpg"][-1]] == ["1", "2"]
    assert found["other.jpg"] is None


def test_pattern_sees_only_the_folders_below_the_root(tmp_path):
    save_image(tmp_path / "cam7" / "set" / "cam1" / "a.jpg")
    save_image(tmp_path / "cam7" / "set" / "cam2" / "a2.jpg")
    assert cameras(tmp_path / "cam7", r"cam(\d)") == {"a.jpg": "1", "a2.jpg": "2"}


def test_pattern_that_matches_nothing_or_is_broken_is_an_error(tmp_path):
    save_image(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"'cam\(\\\\d\)' matches none of the 1 files"):
        read_image_folder(tmp_path, camera_pattern=r"cam(\d)")
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
        read_image_folder(tmp_path, camera_pattern="(")


def test_broken_files_are_listed_and_folders_are_not(tmp_path):
    """Unreadable files of all data sets are found later, before the training."""
    save_image(tmp_path / "good.jpg")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "folder.jpg").mkdir()
    names = [Path(item.path).name for item in read_image_folder(tmp_path)]
    assert names == ["empty.jpg", "gone.jpg", "good.jpg"]


def test_no_image_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no image files"):
        read_image_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_image_folder(tmp_path / "nowhere")
