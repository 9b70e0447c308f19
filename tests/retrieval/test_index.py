"""Indexes: exact search, and consistency after kills and changes."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.indexes import OfDim, filled
from helpers.indexes import unit as unit_rows
from selcon_plugin.datasets import read_image_folder
from selcon_plugin.engine.image_check import BadImagesError
from selcon_plugin.retrieval import Index, exact, search, stored_search
from selcon_plugin.retrieval.approximate import choose_kind
from selcon_plugin.retrieval.store import IndexedImage

ROOT = Path(__file__).parents[2]


def unit(rng, count, dim=32):
    return unit_rows(rng.normal(size=(count, dim)))


def found_by(index, features, **options):
    return [
        [(match.path, round(match.similarity, 5)) for match in matches]
        for matches in index.search(features, **options)
    ]


def brute_force(queries, features, top, keep=None):
    cosines = queries.astype(np.float64) @ features.astype(np.float64).T
    if keep is not None:
        cosines[:, ~keep] = -np.inf
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :top]
    return [
        [
            (f"/crops/{row}.jpg", pytest.approx(cosines[query, row], abs=1e-5))
            for row in order[query]
        ]
        for query in range(len(queries))
    ]


@pytest.mark.parametrize("rows_at_once", [16_384, 7])
def test_flat_search_is_the_sort_of_all_cosines(tmp_path, monkeypatch, rows_at_once):
    monkeypatch.setattr(exact, "_ROWS_AT_ONCE", rows_at_once)
    rng = np.random.default_rng(0)
    features, queries = unit(rng, 200), unit(rng, 5)
    features[150] = features[3]  # a tie: the first is first
    queries[0] = features[3]
    index = filled(tmp_path / "index", features)
    assert found_by(index, queries, top=9) == brute_force(queries, features, 9)
    assert [m.path for m in index.search(queries[:1], top=2)[0]] == [
        "/crops/3.jpg",
        "/crops/150.jpg",
    ]
    assert len(index.search(queries, top=999)[4]) == 200
    # As much memory as for all images, not as for ten trillion.
    assert len(index.search(queries, top=10**13)[4]) == 200
    assert index.kind == "flat"


def test_fp16_takes_half_and_differs_by_rounding(tmp_path):
    rng = np.random.default_rng(1)
    features, queries = unit(rng, 300), unit(rng, 4)
    index = filled(tmp_path / "half", features, fp16=True)
    expected = brute_force(queries, features.astype(np.float16), 5)
    assert found_by(index, queries, top=5) == expected
    exact = [m.similarity for m in index.search(features[:50], top=1)[0]]
    assert exact == pytest.approx([1.0], abs=1e-3)
    size = (tmp_path / "half/features-0.bin").stat().st_size
    assert size == 300 * 32 * 2


def test_cameras_are_chosen_and_left_out(tmp_path):
    rng = np.random.default_rng(2)
    features, queries = unit(rng, 90), unit(rng, 3)
    cameras = [("a", "b", None)[row % 3] for row in range(90)]
    index = filled(tmp_path / "index", features, cameras=cameras)
    is_a = np.array([camera == "a" for camera in cameras])
    assert index.cameras == ["a", "b"]
    assert found_by(index, queries, top=4, camera=["a"]) == brute_force(
        queries, features, 4, is_a
    )
    assert found_by(index, queries, top=4, not_camera=["a"]) == brute_force(
        queries, features, 4, ~is_a
    )
    with pytest.raises(
        ValueError, match="no image of the index is from camera 'c'; its cameras are a, b"
    ):
        index.search(queries, camera=["c"])


def test_threshold_cuts_the_list(tmp_path):
    rng = np.random.default_rng(3)
    features = unit(rng, 50)
    index = filled(tmp_path / "index", features)
    (matches,) = index.search(features[:1], top=50, threshold=0.2)
    assert len(matches) == ((features @ features[0]) >= 0.2).sum() > 1


def test_suggested_threshold_separates_synthetic_persons(tmp_path):
    rng = np.random.default_rng(4)
    people = np.repeat(unit(rng, 40, 64), 6, axis=0)
    features = people + 0.05 * rng.normal(size=people.shape)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    index = filled(tmp_path / "index", features.astype(np.float32))
    found = index.suggest_threshold()
    same = np.repeat(np.arange(40), 6)[:, None] == np.repeat(np.arange(40), 6)
    above = features @ features.T >= found.threshold
    assert found.is_clear
    assert (above == same).mean() > 0.999


def test_threshold_of_many_equal_images_is_no_crash(tmp_path):
    features = np.repeat(unit(np.random.default_rng(5), 2), 1500, axis=0)
    index = filled(tmp_path / "index", features)
    assert not index.suggest_threshold().is_clear


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_approximate_search_misses_little_and_ranks_exactly(tmp_path, kind):
    pytest.importorskip("faiss")
    rng = np.random.default_rng(6)
    people = np.repeat(unit(rng, 500), 8, axis=0)
    features = (people + 0.08 * rng.normal(size=people.shape)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    cameras = [("a", "b")[row % 2] for row in range(len(features))]
    index = filled(tmp_path / "index", features, cameras=cameras, kind=kind)
    queries = features[::40]
    assert index.kind == kind
    is_a = np.arange(len(features)) % 2 == 0
    for options, keep in (({}, None), ({"camera": ["a"]}, is_a)):
        expected = brute_force(queries, features, 10, keep)
        found = found_by(index, queries, top=10, **options)
        hits = sum(
            pair in wanted
            for got, wanted in zip(found, expected, strict=True)
            for pair in got
        )
        assert hits >= 0.98 * 10 * len(queries)  # with their exact cosines
    # What is added later is found before the search knows of it.
    late = unit(rng, 3)
    late_images = [IndexedImage(f"/late/{row}.jpg", None, 1, 1) for row in range(3)]
    with index._store.writing():
        index._store.append(late, late_images)
        index._maintain()
    assert [m[0].path for m in index.search(late, top=1)] == [i.path for i in late_images]
    index.remove("/late/1.jpg")
    assert "/late/1.jpg" not in [m.path for m in index.search(late, top=4)[1]]
    index.remove("8.jpg")  # a row that the approximate search knows of
    assert "/crops/8.jpg" not in [m.path for m in index.search(features[8:9])[0]]
    # Another process that has just replaced the file, or a machine without faiss.
    again = Index.open(tmp_path / "index")
    next((tmp_path / "index").glob("*.faiss")).unlink()
    keep = np.arange(len(features)) != 8
    assert found_by(again, queries, top=5) == brute_force(queries, features, 5, keep)


def test_approximate_search_grows_with_the_index(tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(stored_search, "_MAX_TAIL", 10)
    rng = np.random.default_rng(7)
    index = filled(tmp_path / "index", unit(rng, 200), kind="hnsw")
    rows = unit(rng, 11)
    with index._store.writing():
        images = [IndexedImage(f"/late/{row}.jpg", None, 1, 1) for row in range(11)]
        index._store.append(rows, images)
        index._maintain()
    assert index._store.manifest.approximate["num_rows"] == 211
    assert len(list((tmp_path / "index").glob("*.faiss"))) == 1
    assert [m[0].path for m in index.search(rows, top=1)] == [i.path for i in images]


def test_kind_is_chosen_by_size(monkeypatch):
    sizes = (100_000, 100_001, 1_000_000, 1_000_001)
    if pytest.importorskip("faiss"):
        assert [choose_kind("auto", n) for n in sizes] == ["flat", "hnsw", "hnsw", "ivf"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert [choose_kind("auto", n) for n in sizes] == ["flat"] * 4
    with pytest.raises(ImportError, match=r"needs faiss: .* pip install "):
        choose_kind("hnsw", 5)
    with pytest.raises(ValueError, match=r"search .*auto, flat, hnsw, ivf"):
        choose_kind("tree", 5)


def by_path(index, embedder, folder):
    """Results for each image of a folder, independent of the order of the rows."""
    files = [item.path for item in read_image_folder(folder, camera_pattern="none")]
    results = search(index, files, embedder=embedder, top=100)
    return {
        r.query: sorted((m.path, m.similarity, m.camera) for m in r.matches)
        for r in results
    }


def test_adding_and_removing_equals_rebuilding(tmp_path, embedder, draw_images):
    first, second = draw_images("first"), draw_images("second", seed=1)
    changed = Index.create(tmp_path / "changed", embedder)
    changed.add(first, embedder)
    assert changed.remove("cam0/*") == 12
    added = changed.add(second, embedder, batch_size=5)
    assert (added.new, added.changed, added.known) == (24, 0, 0)
    changed = Index.open(tmp_path / "changed")  # from the disk

    shutil.move(first / "cam0", tmp_path / "elsewhere")
    rebuilt = Index.create(tmp_path / "rebuilt", embedder)
    rebuilt.add(first, embedder)
    rebuilt.add(second, embedder)
    assert len(changed) == len(rebuilt) == 36
    assert sorted(changed.paths) == sorted(rebuilt.paths)
    assert by_path(changed, embedder, second) == by_path(rebuilt, embedder, second)


def test_most_rows_removed_are_dropped_from_the_files(tmp_path, embedder, draw_images):
    folder = draw_images("crops")
    index = Index.create(tmp_path / "index", embedder)
    index.add(folder, embedder)
    index.remove("cam0/*")
    assert (tmp_path / "index/features-0.bin").stat().st_size == 24 * 24 * 4
    before = by_path(index, embedder, folder / "cam1")
    index.remove("p0_1.png")
    left = {path: rows for path, rows in before.items() if "p0_1" not in path}
    after = by_path(index, embedder, folder / "cam1")
    for path, rows in left.items():
        assert after[path] == [row for row in rows if "p0_1" not in row[0]]
    names = sorted(file.name for file in (tmp_path / "index").iterdir())
    assert names == ["features-1.bin", "images-1.jsonl", "index.json"]
    assert (tmp_path / "index/features-1.bin").stat().st_size == 11 * 24 * 4
    assert index.remove("*.png") == 11
    assert index.search(embedder([Image.new("RGB", (9, 9), "red")])) == [()]


def test_only_new_and_changed_images_are_embedded(tmp_path, embedder, draw_images):
    folder = draw_images("crops")
    index = Index.create(tmp_path / "index", embedder)
    index.add(folder, embedder)
    embedder.num_embedded = 0
    Image.new("RGB", (16, 32), (10, 200, 30)).save(folder / "cam0/p0_0.png")
    Image.new("RGB", (16, 32), (200, 20, 30)).save(folder / "cam0/new.png")
    added = index.add(folder, embedder)
    assert (added.new, added.changed, added.known) == (1, 1, 23)
    assert len(index) == 25
    assert embedder.num_embedded == 2 + 4  # and the four probes
    (green,) = search(index, [folder / "cam0/new.png"], embedder=embedder, top=1)
    assert green.matches[0].path != str(folder / "cam0/new.png")  # not itself
    (found,) = index.search(embedder([Image.new("RGB", (16, 32), (10, 200, 30))]), top=1)
    assert found[0].path == str(folder / "cam0/p0_0.png")
    assert found[0].similarity == pytest.approx(1.0, abs=1e-6)


def test_cameras_come_from_the_paths_even_if_there_is_one(tmp_path, embedder, draw_images):
    folder = draw_images("crops", cameras=1)
    index = Index.create(tmp_path / "index", embedder)
    index.add(folder, embedder, camera_pattern=r"cam(\d)")
    assert index.cameras == ["0"]
    with pytest.raises(ValueError, match="matches none of the 24 files"):
        index.add(folder, embedder, camera_pattern="lens")
    with pytest.raises(ValueError, match=r"'\('.*regular expression"):
        index.add(folder, embedder, camera_pattern="(")


def test_unreadable_images_are_left_out_up_to_a_ratio(tmp_path, embedder, draw_images):
    folder = draw_images("crops")
    (folder / "cam0/broken.png").write_bytes(b"no image")
    index = Index.create(tmp_path / "index", embedder)
    with pytest.raises(BadImagesError, match=r"(?s)1 of 25 .*0\.01 .*max_unreadable_ratio"):
        index.add(folder, embedder, max_unreadable_ratio=0.01)
    added = index.add(folder, embedder)
    assert (added.new + added.known, len(index)) == (24, 24)
    assert "broken.png: not an image" in added.unreadable[0]


def test_another_network_is_refused(tmp_path, embedder, draw_images):
    folder = draw_images("crops")
    index = Index.create(tmp_path / "index", embedder)
    index.add(folder, embedder)
    other = type(embedder)(tint=0.3)
    for use in (
        lambda: index.add(folder, other),
        lambda: search(index, [folder / "cam0/p0_0.png"], embedder=other),
        lambda: search(index, [folder / "cam0/p0_0.png"], embedder=OfDim(7)),
    ):
        with pytest.raises(ValueError, match="created with another network"):
            use()
    nearly = type(embedder)(tint=0.001)  # as half precision, or an export
    assert search(index, [folder / "cam0/p0_0.png"], embedder=nearly)[0].matches


def test_answers_that_are_no_unit_vectors_are_refused(tmp_path):
    class Long(OfDim):
        def __call__(self, images, *, batch_size=64):
            return 2.0 * super().__call__(images)

    with pytest.raises(ValueError, match="vectors of unit length"):
        Index.create(tmp_path / "index", Long(8))


def test_a_killed_add_loses_nothing_and_resumes(tmp_path, embedder, draw_images):
    folder, late = draw_images("crops"), draw_images("late", seed=1, people=12)
    script = textwrap.dedent(
        f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from conftest import ColorGrid
        from selcon_plugin.retrieval import Index, update as module
        class Slow(ColorGrid):
            def __call__(self, images, *, batch_size=64):
                time.sleep(0.05 * (len(images) > 4))
                return super().__call__(images)
        module._IMAGES_PER_COMMIT = 8
        index = Index.create("index", ColorGrid())
        index.add({str(folder)!r}, ColorGrid())
        print("begins", flush=True)
        index.add({str(late)!r}, Slow(), batch_size=8)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "begins\n"
    time.sleep(0.12)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    index = Index.open(tmp_path / "index")
    there = len(index)
    assert 24 <= there < 72
    # What a kill leaves half written.
    for name in ("features-0.bin", "images-0.jsonl"):
        with open(tmp_path / "index" / name, "ab") as stream:
            stream.write(b'["half a li')
    (tmp_path / "index/index.json.partial").write_text("{")
    (tmp_path / "index/approximate-hnsw-0-9.faiss").write_text("half")
    added = index.add(late, embedder)
    assert (added.new, added.known) == (72 - there, there - 24)
    rebuilt = Index.create(tmp_path / "rebuilt", embedder)
    rebuilt.add(folder, embedder)
    rebuilt.add(late, embedder)
    assert by_path(index, embedder, late) == by_path(rebuilt, embedder, late)
    names = sorted(file.name for file in (tmp_path / "index").iterdir())
    assert names == ["features-0.bin", "images-0.jsonl", "index.json"]


@pytest.mark.parametrize("step", ["os.replace", "os.fsync"])
def test_a_failed_write_leaves_the_index_as_it_was(
    tmp_path, embedder, draw_images, monkeypatch, step
):
    folder = draw_images("crops")
    index = Index.create(tmp_path / "index", embedder)
    index.add(folder, embedder)
    before = by_path(index, embedder, folder)

    def fail(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(step, fail)
        for change in (
            lambda: index.add(draw_images("late", seed=1), embedder),
            lambda: index.remove("cam0/*"),
        ):
            with pytest.raises(OSError, match="No space left"):
                change()
    for one in (index, Index.open(tmp_path / "index")):
        assert by_path(one, embedder, folder) == before


def test_two_processes_add_one_after_the_other(tmp_path, embedder, draw_images):
    first, second = draw_images("first"), draw_images("second", seed=1)
    one = Index.create(tmp_path / "index", embedder)
    other = Index.open(tmp_path / "index")
    one.add(first, embedder)
    other.add(second, embedder)  # opened before the first was added
    assert len(other) == len(Index.open(tmp_path / "index")) == 48


def test_reports_what_is_wrong_with_a_folder(tmp_path, embedder):
    with pytest.raises(FileNotFoundError, match="create one with selcon index"):
        Index.open(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty: name a new folder"):
        Index.create(tmp_path / "full", embedder)
    index = filled(tmp_path / "index", unit(np.random.default_rng(0), 9))
    assert str(index) == "9 images, 32 values in float32, search flat (exact)"
    features = tmp_path / "index/features-0.bin"
    features.write_bytes(features.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"damaged: features-0.bin is too short"):
        Index.open(tmp_path / "index")
    (tmp_path / "index/index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index.json is damaged"):
        Index.open(tmp_path / "index")


def test_refuses_wrong_arguments(tmp_path, embedder, draw_images):
    folder = draw_images("crops")
    index = Index.create(tmp_path / "index", embedder)
    with pytest.raises(ValueError, match="index of at least 3 images, not 0"):
        index.suggest_threshold()
    index.add(folder, embedder)
    for features, message in (
        (np.zeros((1, 5)), r"features of queries.*24\), got \(1, 5\)"),
        (np.full((1, 24), np.nan), "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            index.search(features)
    with pytest.raises(ValueError, match="top must be a whole number >= 1"):
        index.search(np.zeros((1, 24)), top=0)
    with pytest.raises(ValueError, match=r"matches none of the 24.*for instance not"):
        index.remove("*.gif")
    with pytest.raises(ValueError, match="batch_size"):
        index.add(folder, embedder, batch_size=0)
    with pytest.raises(ValueError, match="does not name its network"):
        search(tmp_path / "index", [folder / "cam0/p0_0.png"])
