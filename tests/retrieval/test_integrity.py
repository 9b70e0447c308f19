"""Damaged files, links, several processes and open handles of an index."""

import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

from selcon_plugin.io.integrity import DamagedFileError
from selcon_plugin.io.locks import InUseError
from selcon_plugin.retrieval import Index, feature_file, nearest, search, store
from selcon_plugin.retrieval.store import IndexedImage

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(draw_images):
    return draw_images("crops")


@pytest.fixture
def index(tmp_path, embedder, folder, monkeypatch):
    monkeypatch.setattr(feature_file, "_BLOCK_BYTES", 3 * 24 * 4)  # three rows
    index = Index.create(tmp_path / "index", embedder)
    index.add(folder, embedder)
    return index


def results(index, embedder, folder):
    files = sorted(folder.rglob("*.png"))
    found = search(index, files, embedder=embedder, top=100)
    return {
        r.query: sorted((m.path, round(m.similarity, 5), m.camera) for m in r.matches)
        for r in found
    }


def flip(file, position, bit=1):
    content = bytearray(file.read_bytes())
    content[position] ^= bit
    file.write_bytes(content)


def test_every_bit_of_the_features_counts(tmp_path, index, embedder, folder):
    right = results(index, embedder, folder)
    file = tmp_path / "index/features-0.bin"
    size = file.stat().st_size
    for position in (0, 1, size // 2, size - 1):
        flip(file, position)
        damaged = Index.open(tmp_path / "index")
        with pytest.raises(DamagedFileError, match=r"features-0\.bin.*selcon index again"):
            results(damaged, embedder, folder)
        flip(file, position)
    assert results(Index.open(tmp_path / "index"), embedder, folder) == right


def test_damaged_features_are_computed_again(tmp_path, index, embedder, folder, caplog):
    right = results(index, embedder, folder)
    flip(tmp_path / "index/features-0.bin", 5)
    embedder.num_embedded = 0
    repaired = Index.open(tmp_path / "index")
    added = repaired.add(folder, embedder)
    assert (added.repaired, added.new, added.known) == (3, 3, 21)
    assert embedder.num_embedded == 3 + 4
    assert "3 images are damaged" in caplog.text
    for one in (repaired, Index.open(tmp_path / "index")):
        assert results(one, embedder, folder) == right


def test_damaged_lists_and_manifests_are_refused(tmp_path, index, embedder, folder):
    for name in ("index.json", "images-0.jsonl"):
        file = tmp_path / "index" / name
        for position in range(0, file.stat().st_size, max(1, file.stat().st_size // 40)):
            flip(file, position)
            with pytest.raises(ValueError, match=r"(damaged|version)") as raised:
                Index.open(tmp_path / "index")
            assert "index" in str(raised.value)
            flip(file, position)
    assert len(Index.open(tmp_path / "index")) == 24


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("generation", "../../x"),
        ("num_rows", -1),
        ("num_rows", "24"),
        ("dim", 0),
        ("dtype", "object"),
        ("network", []),
        ("approximate", {"file": "../../etc/passwd", "kind": "hnsw"}),
        ("approximate", {"kind": "hnsw"}),
        ("unknown", 1),
    ],
)
def test_values_that_no_index_has_are_refused(tmp_path, index, key, value):
    file = tmp_path / "index/index.json"
    content = json.loads(file.read_text())
    del content["checksum"]
    content[key] = value
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="damaged"):
        Index.open(tmp_path / "index")


def made_approximate(folder, count=300):
    pytest.importorskip("faiss")

    class OfDim:
        dim = 16

        def __call__(self, images, *, batch_size=64):
            return unit[: len(images)]

    unit = np.random.default_rng(0).normal(size=(count, 16)).astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    index = Index.create(folder, OfDim(), kind="hnsw")
    images = [IndexedImage(f"/c/{row}.jpg", None, 1, 1) for row in range(count)]
    with index._store.writing():
        index._store.append(unit, images)
        index._maintain()
    return index, unit


def approximately(results):
    # The exact search adds in another order: a similarity may differ in its last bits.
    return [
        [(m.path, pytest.approx(m.similarity, abs=1e-5)) for m in matches]
        for matches in results
    ]


def plain(results):
    return [[(m.path, m.similarity) for m in matches] for matches in results]


def test_a_damaged_search_is_replaced_by_the_exact_one(tmp_path, monkeypatch, caplog):
    index, unit = made_approximate(tmp_path / "index")
    monkeypatch.setattr(nearest, "_FEW_ROWS", 0)
    expected = approximately(index.search(unit[:5]))
    (file,) = (tmp_path / "index").glob("*.faiss")
    flip(file, file.stat().st_size // 2, 64)
    again = Index.open(tmp_path / "index")
    with caplog.at_level(logging.WARNING):
        assert plain(again.search(unit[:5])) == expected
    assert "The search is exact" in caplog.text
    assert file.name in caplog.text
    with again._store.writing():
        again._maintain(repair=True)
    caplog.clear()
    assert plain(Index.open(tmp_path / "index").search(unit[:5])) == expected
    assert not caplog.records


def test_features_cut_off_while_open_do_not_end_the_process(
    tmp_path, index, embedder, folder
):
    file = tmp_path / "index/features-0.bin"
    with open(file, "r+b") as stream:
        stream.truncate(100)
    with pytest.raises(DamagedFileError, match="too short"):
        results(index, embedder, folder)


def test_index_of_the_first_format_is_read_and_upgraded(tmp_path, index, embedder, folder):
    right = results(index, embedder, folder)
    old = tmp_path / "index"
    content = json.loads((old / "index.json").read_text())
    lines = (old / "images-0.jsonl").read_text().splitlines()
    images = [line for line in map(json.loads, lines) if isinstance(line, list)]
    first = [image[:4] for image in images]
    # The folder was added by another name as well, as the first format allowed.
    (tmp_path / "link").symlink_to(folder)
    first.append([str(tmp_path / "link" / "cam0/p0_0.png"), "cam0", *first[0][2:]])
    log = "".join(json.dumps(image) + "\n" for image in first)
    features = np.fromfile(old / "features-0.bin", np.float32).reshape(24, 24)
    np.concatenate([features, features[:1]]).tofile(old / "features-0.bin")
    (old / "images-0.jsonl").write_text(log)
    for key in ("checksum", "log_crc"):
        del content[key]
    content |= {"format": 1, "num_rows": 25, "log_bytes": len(log)}
    (old / "index.json").write_text(json.dumps(content))
    opened = Index.open(old)
    assert len(opened) == 25
    embedder.num_embedded = 0
    added = opened.add(folder, embedder)
    assert (added.known, added.removed, embedder.num_embedded) == (24, 1, 4)
    assert results(opened, embedder, folder) == right
    assert json.loads((old / "index.json").read_text())["format"] == 2
    flip(old / opened._store.manifest.features_file, 9)
    with pytest.raises(DamagedFileError):
        results(Index.open(old), embedder, folder)


@pytest.mark.parametrize(
    "name", ["features-0.bin", "images-0.jsonl", "index.json", ".lock", ".lock.owner"]
)
def test_links_in_the_folder_are_not_written_through(
    tmp_path, index, embedder, folder, draw_images, name
):
    target = tmp_path / "precious.txt"
    inside = tmp_path / "index" / name
    if inside.exists():
        shutil.move(inside, target)
    else:
        target.write_text("mine")
    content = target.read_bytes()
    inside.symlink_to(target)
    late = draw_images("late", seed=1)
    for change in (lambda: index.add(late, embedder), lambda: index.remove("cam0/*")):
        with pytest.raises(ValueError, match=rf"{name} is a symbolic link.*precious"):
            change()
    assert target.read_bytes() == content


@pytest.mark.parametrize(
    "name",
    [
        "features-1.bin",
        "images-1.jsonl",
        "index.json.partial",
        "approximate-hnsw-0-9.faiss",
    ],
)
@pytest.mark.parametrize("exists", [True, False])
def test_links_where_a_file_will_be_are_replaced(tmp_path, index, name, exists):
    target = tmp_path / "precious.txt"
    if exists:
        target.write_text("mine")
    (tmp_path / "index" / name).symlink_to(target)
    index.remove("cam0/*")
    index.remove("p0_1.png")  # the files are rewritten
    assert index._store.manifest.generation == 1
    assert target.exists() == exists
    assert not exists or target.read_text() == "mine"
    assert not any(file.is_symlink() for file in (tmp_path / "index").iterdir())


def test_lock_that_is_a_link_is_refused_before_the_index_exists(tmp_path, embedder):
    target = tmp_path / "precious.txt"
    target.write_text("mine")
    (tmp_path / "index").mkdir()
    (tmp_path / "index/.lock").symlink_to(target)
    with pytest.raises(ValueError, match=r"\.lock is a symbolic link"):
        Index.create(tmp_path / "index", embedder)
    assert target.read_text() == "mine"


def test_hard_links_of_a_backup_keep_their_content(
    tmp_path, index, embedder, folder, draw_images
):
    backup = tmp_path / "backup"
    shutil.copytree(tmp_path / "index", backup, copy_function=os.link)
    before = {file.name: file.read_bytes() for file in backup.iterdir()}
    right = results(index, embedder, folder)
    index.add(draw_images("late", seed=1), embedder)
    index.remove("cam1/*")
    assert {file.name: file.read_bytes() for file in backup.iterdir()} == before
    assert results(Index.open(backup), embedder, folder) == right


def test_files_of_the_user_in_the_folder_stay(tmp_path, index):
    for name in ("features-mine.npz", "images-list.txt", "approximate-notes.md", "x.txt"):
        (tmp_path / "index" / name).write_text("mine")
    index.remove("cam0/*")
    index.remove("p0_1.png")
    assert len([f for f in (tmp_path / "index").iterdir() if f.suffix != ".bin"]) == 6


def test_open_index_follows_other_processes(tmp_path, index, embedder, folder, draw_images):
    other = Index.open(tmp_path / "index")
    late = draw_images("late", seed=1)
    other.add(late, embedder)
    assert len(index) == 48
    assert len(index.paths) == 48
    assert results(index, embedder, folder) == results(other, embedder, folder)
    other.remove("cam0/*")
    assert len(index) == 24
    other.remove("p0_1.png")  # its files are rewritten, and the old ones removed
    assert other._store.manifest.generation == 1
    assert results(index, embedder, folder) == results(other, embedder, folder)
    assert len(index) == len(other) == 22
    other.remove("*.png")
    assert len(index) == 0
    assert index.cameras == []
    shutil.rmtree(tmp_path / "index")
    for use in (
        lambda: len(index),
        lambda: index.search(np.eye(1, 24)),
        lambda: str(index),
    ):
        with pytest.raises(FileNotFoundError, match="there is no index in"):
            use()


def test_search_while_another_thread_changes_the_index(tmp_path, index, embedder, folder):
    queries = embedder([np.full((4, 2, 3), n, np.uint8) for n in (3, 99, 200)])
    stopped = threading.Event()
    problems = []

    def change():
        other = Index.open(tmp_path / "index")
        for _ in range(6):
            other.remove("cam0/*")
            other.remove("p0_1.png")
            other.add(folder, embedder)
        stopped.set()

    thread = threading.Thread(target=change)
    thread.start()
    while not stopped.is_set():
        counts = {len(matches) for matches in index.search(queries, top=100)}
        if not counts <= {11, 12, 24, *range(11, 25)}:
            problems.append(counts)
    thread.join()
    assert not problems
    assert len(index) == 24


def writer(tmp_path, seconds):
    """A process that holds the index, from when it prints a line."""
    code = f"""
        import time
        from selcon_plugin.retrieval import Index
        index = Index.open({str(tmp_path / "index")!r})
        with index._store.writing():
            print("writing", flush=True)
            time.sleep({seconds})
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "writing\n"
    return process


def test_second_writer_says_whom_it_waits_for_and_ends(
    tmp_path, index, embedder, folder, monkeypatch, caplog
):
    monkeypatch.setattr(store, "_MAX_WAIT", 0.5)
    process = writer(tmp_path, 60)
    try:
        assert len(search(index, [folder / "cam0/p0_0.png"], embedder=embedder)) == 1
        for change in (
            lambda: index.add(folder, embedder),
            lambda: Index.open(tmp_path / "index").remove("cam0/*"),
        ):
            caplog.clear()
            with pytest.raises(InUseError, match=rf"(?i)process {process.pid} .*0 s"):
                change()
            assert f"process {process.pid}" in caplog.text
            assert "waiting for at most" in caplog.text
    finally:
        process.kill()
        process.communicate()
    assert index.remove("cam0/*") == 12  # the lock of a killed process is free


def test_second_writer_continues_when_the_first_ends(tmp_path, index, embedder, folder):
    process = writer(tmp_path, 0.3)
    assert index.remove("cam0/*") == 12
    process.communicate()
