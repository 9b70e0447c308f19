"""The image list of a run knows the content of its images."""

import json
import os

import pytest

from selcon_plugin.engine.image_list import (
    IMAGE_LIST,
    images_to_resume_with,
    write_image_list,
)
from selcon_plugin.engine.images import IndexedImages


def images_in(folder):
    return IndexedImages([(str(f), 0, 0) for f in folder.glob("*.jpg")], open, None)


@pytest.fixture
def run(tmp_path):
    """A run's folder, and that of its images."""
    crops = tmp_path / "crops"
    crops.mkdir()
    for i in range(6):
        (crops / f"{i}.jpg").write_bytes(bytes([i] * 10))
    write_image_list(tmp_path / "run", images_in(crops))
    return tmp_path / "run", crops


def exchange(file):
    status = file.stat()
    file.write_bytes(b"other data"[: status.st_size])
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_image_of_the_same_name_size_and_time_is_named(run):
    folder, crops = run
    images = images_in(crops)
    assert images_to_resume_with(folder, images) is images
    exchange(crops / "3.jpg")
    with pytest.raises(
        ValueError, match=r"1 images have another content.*3\.jpg"
    ) as refused:
        images_to_resume_with(folder, images_in(crops))
    assert "start a new run" in str(refused.value)


def test_exchanged_image_is_named_where_others_are_gone_or_the_folder_moved(run):
    folder, crops = run
    exchange(crops / "3.jpg")
    moved = crops.rename(crops.with_name("moved"))
    with pytest.raises(ValueError, match=r"3\.jpg"):
        images_to_resume_with(folder, images_in(moved))
    moved = moved.rename(crops)
    (moved / "5.jpg").unlink()
    with pytest.raises(ValueError, match=r"3\.jpg"):
        images_to_resume_with(folder, images_in(moved))


def test_images_that_are_gone_keep_their_rows_and_hashes(run):
    folder, crops = run
    before = images_in(crops).hashes
    (crops / "2.jpg").unlink()
    images = images_to_resume_with(folder, images_in(crops))
    assert len(images) == 6
    assert images.hashes == before


def test_list_of_an_earlier_version_has_no_content(run):
    folder, crops = run
    file = folder / IMAGE_LIST
    content = json.loads(file.read_text())
    del content["checksum"]
    content["columns"] = content["columns"][:4]
    content["images"] = [row[:4] for row in content["images"]]
    file.write_text(json.dumps(content))
    exchange(crops / "3.jpg")
    images = images_in(crops)
    assert images_to_resume_with(folder, images) is images
    (crops / "2.jpg").unlink()
    assert len(images_to_resume_with(folder, images_in(crops))) == 6


def test_damaged_list_is_named(run, caplog):
    folder, crops = run
    file = folder / IMAGE_LIST
    file.write_text(file.read_text().replace("crops", "crows", 1))
    images = images_in(crops)
    assert images_to_resume_with(folder, images) is images
    assert f"{file} is damaged" in caplog.text
