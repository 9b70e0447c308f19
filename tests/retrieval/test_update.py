"""An index follows its folder: removed, replaced, moved and renamed files, and links."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from selcon_plugin.engine.image_check import BadImagesError
from selcon_plugin.retrieval import Index, search


@pytest.fixture
def index(tmp_path, embedder, folder):
    index = Index.create(tmp_path / "index", embedder)
    added = index.add(folder, embedder)
    assert (added.new, len(index)) == (24, 24)
    embedder.num_embedded = 0
    return index


def counts(added):
    """Added, changed, removed, moved, with another camera, unchanged."""
    return (
        *(added.new, added.changed, added.removed),
        *(added.moved, added.relabeled, added.known),
    )


def equals_a_new_index(tmp_path, index, folder, embedder, **options):
    fresh = Index.create(tmp_path / "fresh", embedder)
    fresh.add(folder, embedder, **options)
    both = []
    for one in (index, Index.open(index._store.folder), fresh):
        queries = embedder([Image.open(path).convert("RGB") for path in fresh.paths])
        (found, *_) = [
            sorted((m.path, round(m.similarity, 5), m.camera) for m in matches)
            for matches in one.search(queries, top=100)
        ]
        both.append((sorted(one.paths), one.cameras, found))
    assert both[0] == both[1] == both[2]
    return True


def test_deleted_files_are_no_longer_found(tmp_path, index, folder, embedder):
    for file in (folder / "cam0").iterdir():
        file.unlink()
    added = index.add(folder, embedder)
    assert counts(added) == (0, 0, 12, 0, 0, 12)
    assert str(added) == "0 images added, 0 updated, 12 removed, 12 unchanged"
    assert not any("cam0" in path for path in index.paths)
    assert equals_a_new_index(tmp_path, index, folder, embedder)


@pytest.mark.parametrize("same_time", [False, True])
def test_replaced_content_is_noticed_whatever_size_and_time(
    tmp_path, index, folder, embedder, same_time
):
    first, second = folder / "cam0/p0_0.png", folder / "cam1/p3_1.png"
    times = os.stat(first)
    content = bytearray(first.read_bytes())
    other = second.read_bytes()
    shutil.copy(second, first)
    if same_time:  # a file of the same size and time, as rsync -t leaves it
        size = max(len(content), len(other))
        first.write_bytes(other.ljust(size, b"\0"))
        index.add(folder, embedder)
        embedder.num_embedded = 0
        first.write_bytes(bytes(content).ljust(size, b"\0"))
        os.utime(first, ns=(times.st_atime_ns, times.st_mtime_ns))
        index.add(folder, embedder)
        first.write_bytes(other.ljust(size, b"\0"))
        os.utime(first, ns=(times.st_atime_ns, times.st_mtime_ns))
    added = index.add(folder, embedder)
    assert counts(added) == (0, 1, 0, 0, 0, 23)
    assert equals_a_new_index(tmp_path, index, folder, embedder)


def test_touched_and_moved_files_are_not_read_again(tmp_path, index, folder, embedder):
    os.utime(folder / "cam0/p0_0.png", (1, 1))
    (folder / "cam0/p1_0.png").rename(folder / "cam0/renamed.png")
    (folder / "cam2").mkdir()
    (folder / "cam0/p2_0.png").rename(folder / "cam2/p2_0.png")
    added = index.add(folder, embedder)
    assert counts(added) == (0, 0, 0, 2, 0, 22)
    assert "2 updated (2 moved)" in str(added)
    assert embedder.num_embedded == 4  # the test patterns
    assert index.cameras == ["cam0", "cam1", "cam2"]
    assert equals_a_new_index(tmp_path, index, folder, embedder)


def test_moved_folder_is_moved(tmp_path, index, folder, embedder):
    inside = folder / "deeper"
    inside.mkdir()
    (folder / "cam0").rename(inside / "cam0")
    added = index.add(folder, embedder, camera_pattern=r"cam\d")
    assert counts(added) == (0, 0, 0, 12, 0, 12)
    assert equals_a_new_index(tmp_path, index, folder, embedder, camera_pattern=r"cam\d")


def test_copies_stay_and_the_gone_one_of_them_goes(tmp_path, index, folder, embedder):
    shutil.copy(folder / "cam0/p0_0.png", folder / "cam0/copy.png")
    assert counts(index.add(folder, embedder)) == (1, 0, 0, 0, 0, 24)
    (folder / "cam0/p0_0.png").unlink()
    assert counts(index.add(folder, embedder)) == (0, 0, 1, 0, 0, 24)
    assert equals_a_new_index(tmp_path, index, folder, embedder)


def test_another_pattern_changes_the_cameras(tmp_path, index, folder, embedder):
    added = index.add(folder, embedder, camera_pattern=r"_(\d)\.png")
    assert counts(added) == (0, 0, 0, 0, 24, 0)
    assert "24 updated (24 with another camera)" in str(added)
    assert index.cameras == ["0", "1", "2", "3"]
    assert embedder.num_embedded == 4
    (matches,) = index.search(
        embedder([Image.open(folder / "cam0/p0_0.png")]), camera=["2"]
    )
    assert {match.camera for match in matches} == {"2"}
    assert equals_a_new_index(
        tmp_path, index, folder, embedder, camera_pattern=r"_(\d)\.png"
    )
    assert index.add(folder, embedder, camera_pattern="none").relabeled == 24
    assert index.cameras == []


def test_a_sub_folder_keeps_the_cameras_of_its_folder(index, folder, embedder):
    added = index.add(folder / "cam0", embedder)
    assert counts(added) == (0, 0, 0, 0, 0, 12)
    assert index.cameras == ["cam0", "cam1"]


@pytest.mark.parametrize("form", ["link", "relative", "dots", "link in folder"])
def test_other_names_of_a_folder_are_the_same_folder(
    tmp_path, monkeypatch, index, folder, embedder, form
):
    other = tmp_path / "other"
    if form == "link":
        other.symlink_to(folder)
    elif form == "link in folder":
        other.mkdir()
        (other / "crops").symlink_to(folder)
    elif form == "relative":
        monkeypatch.chdir(tmp_path)
        other = folder.name
    else:
        other = folder / ".." / folder.name
    before = sorted(map(os.path.realpath, index.paths))
    added = index.add(other, embedder)
    assert (added.new, added.changed, added.removed) == (0, 0, 0)
    assert sorted(map(os.path.realpath, index.paths)) == before
    assert len(index) == 24
    # A query by any name is not one of its own results.
    query = tmp_path / "query.png"
    query.symlink_to(folder / "cam0/p0_0.png")
    (result,) = search(index, [query], embedder=embedder, top=24)
    found = {os.path.realpath(match.path) for match in result.matches}
    assert os.path.realpath(query) not in found
    assert len(found) == 23


def test_links_to_one_file_are_one_image(tmp_path, index, folder, embedder):
    (folder / "cam0/again.png").symlink_to(folder / "cam0/p0_0.png")
    added = index.add(folder, embedder)
    assert (added.new, added.changed, added.removed, len(index)) == (0, 0, 0, 24)


def test_only_the_given_folder_is_updated(tmp_path, index, folder, embedder, draw_images):
    late = draw_images("late", seed=1)
    index.add(late, embedder)
    shutil.rmtree(folder / "cam0")
    assert index.add(late, embedder).removed == 0
    assert len(index) == 48
    assert index.add(folder, embedder).removed == 12
    # A folder whose name begins with the same letters is another one.
    shutil.copytree(late, tmp_path / "crops2")
    index.add(tmp_path / "crops2", embedder)
    assert index.add(folder, embedder).removed == 0


def test_a_file_that_became_unreadable_is_removed(index, folder, embedder):
    (folder / "cam0/p0_0.png").write_bytes(b"no image")
    added = index.add(folder, embedder)
    assert (added.removed, len(added.unreadable), len(index)) == (1, 1, 23)
    assert not any("p0_0" in path for path in index.paths)
    again = index.add(folder, embedder)
    assert (again.new, again.removed, again.known, len(again.unreadable)) == (0, 0, 23, 1)


@pytest.mark.parametrize(
    "name", ["a: b.png", ": .png", "a\n: b.png", "no image: truncated.png", "ü: ß.png"]
)
def test_counts_do_not_depend_on_names(index, folder, embedder, name):
    (folder / f"cam0/{name}").write_bytes(b"no image")
    added = index.add(folder, embedder)
    assert counts(added) == (0, 0, 0, 0, 0, 24)
    Image.new("RGB", (16, 32), "red").save(folder / f"cam0/{name}")
    assert index.add(folder, embedder).new == 1
    (folder / f"cam0/{name}").write_bytes(b"no image again")
    added = index.add(folder, embedder)
    assert counts(added) == (0, 0, 1, 0, 0, 24)


def test_nothing_is_removed_if_the_update_fails(tmp_path, index, folder, embedder):
    for file in list((folder / "cam0").iterdir())[:6]:
        file.unlink()
    for number in range(6):
        (folder / f"cam1/broken{number}.png").write_bytes(b"no image %d" % number)
    with pytest.raises(BadImagesError):
        index.add(folder, embedder)
    assert len(index) == len(Index.open(tmp_path / "index")) == 24
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError):
        index.add(folder, embedder)
    folder.mkdir()
    with pytest.raises(ValueError, match="no image"):
        index.add(folder, embedder)
    assert len(index) == 24
    # The images of a folder that is empty for good are removed by its path.
    assert index.remove(str(folder)) == 24


def test_files_of_a_drive_that_does_not_answer_stay(
    index, folder, embedder, monkeypatch, draw_images
):
    shutil.rmtree(folder / "cam0")
    stat = os.stat

    def failing(path, *args, **kwargs):
        if "cam0" in str(path):
            raise OSError(5, "Input/output error")
        return stat(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("selcon_plugin.retrieval.update.os.stat", failing)
        assert index.add(folder, embedder).removed == 0
    assert len(index) == 24
    assert index.add(folder, embedder).removed == 12


def test_many_updates_equal_a_new_index(tmp_path, index, folder, embedder):
    rng = np.random.default_rng(0)
    for step in range(3):
        files = sorted(folder.rglob("*.png"))
        for file in rng.choice(files, 3, replace=False):
            file.unlink()
        files = sorted(folder.rglob("*.png"))
        for number, file in enumerate(rng.choice(files, 4, replace=False)):
            if number % 2:
                file.rename(file.with_name(f"{file.stem}_{step}.png"))
            else:
                Image.fromarray(rng.integers(0, 256, (32, 16, 3), dtype=np.uint8)).save(
                    file
                )
        Image.fromarray(rng.integers(0, 256, (32, 16, 3), dtype=np.uint8)).save(
            folder / f"cam{step % 2}/new{step}.png"
        )
        index.add(folder, embedder, batch_size=2)
        assert sorted(index.paths) == sorted(map(str, folder.rglob("*.png")))
    assert equals_a_new_index(tmp_path, index, folder, embedder)


def test_results_that_are_gone_are_named(index, folder, embedder, caplog):
    (folder / "cam1/p0_1.png").unlink()
    search(index, [folder / "cam0/p0_0.png"], embedder=embedder)
    assert "1 results are gone" in caplog.text
    assert str(folder / "cam1/p0_1.png") in caplog.text
