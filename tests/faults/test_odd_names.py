"""Names of any characters and bytes: nothing is lost, and nothing is shown raw."""

import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

from helpers.networks import RowMeans
from selcon_plugin.cli.search import _table
from selcon_plugin.datasets import read_image_folder
from selcon_plugin.datasets.reading import read_rgb
from selcon_plugin.engine.image_list import write_image_list
from selcon_plugin.engine.images import IndexedImages
from selcon_plugin.inference.embedder import Embedder
from selcon_plugin.inference.folder_features import FolderFeatures
from selcon_plugin.io.tables import read_table
from selcon_plugin.models.inference import InferenceNetwork
from selcon_plugin.models.preprocessing import Preprocessing
from selcon_plugin.retrieval import Index, search
from selcon_plugin.retrieval.page import write_page
from selcon_plugin.workflows import terminal
from selcon_plugin.workflows.cluster_folder import cluster_folder

FOLDERS = [b"=cam1'", b"+cam2\x1b]0;x\x07", b"cam3 M\xfcller", "cam4 \u202egnp".encode()]
FILES = [b"-x.png", b"two\nlines.png", b"100%s {0}.png", b"a: b.png", b"M\xfc.png"]
FILES += [
    b"y" * 240 + b".png",
    b"@a,b;c.png",
    "\u4eba\U0001f469\u200d\U0001f4bb.png".encode(),
]


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in FOLDERS:
        os.makedirs(os.fsencode(tmp_path / "crops") + b"/" + name)
        for file in FILES:
            path = os.fsencode(tmp_path / "crops") + b"/" + name + b"/" + file
            with open(path, "wb") as stream:
                pixels = rng.integers(0, 256, (16, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(stream, "PNG")
    with open(os.fsencode(tmp_path / "crops") + b"/=cam1'/broken\x1b[2J\xe9.png", "wb"):
        pass
    return tmp_path / "crops"


@pytest.fixture
def embedder():
    preprocessing = Preprocessing((8, 4), "bicubic", (120.0,) * 3, (60.0,) * 3)
    return Embedder(InferenceNetwork(RowMeans(), preprocessing, host="fastreid"))


@pytest.fixture
def expected():
    return sorted(os.fsdecode(a + b"/" + b) for a in FOLDERS for b in FILES)


@pytest.fixture
def nothing_raw(capsys, caplog):
    """All that is printed or logged is printable, line by line."""
    yield
    captured = capsys.readouterr()
    for text in (captured.out, captured.err, *caplog.messages):
        shown = text.replace("\u200d", "")  # joins the parts of an emoji
        assert all(line.isprintable() for line in shown.split("\n")), text


@pytest.mark.usefixtures("nothing_raw")
def test_cluster_keeps_every_name(folder, embedder, tmp_path, expected, caplog):
    for output in (tmp_path / "out", folder):  # inside the images too, twice
        for _ in range(2):
            found = cluster_folder(
                lambda: embedder,
                folder,
                output,
                network_key="x",
                links=True,
                contact_sheet_rows=2,
                echo=terminal.echo,
            )
            assert len(found.paths) == len(expected)
            rows = read_table(output / "clusters.csv")
            assert [row["image"] for row in rows] == expected
            assert {row["camera"] for row in rows} == set(map(os.fsdecode, FOLDERS))
            (output / "clusters.csv").read_text(encoding="utf-8")
    assert r"broken\x1b[2J\udce9.png: empty file" in caplog.text


@pytest.mark.usefixtures("nothing_raw")
def test_features_and_index_keep_every_name(folder, embedder, tmp_path, expected):
    embedder.embed_folder(folder).save(tmp_path / "f.npz")
    paths = FolderFeatures.load(tmp_path / "f.npz").paths
    assert sorted(os.path.relpath(path, folder) for path in paths) == expected
    index = Index.create(tmp_path / "index", embedder)
    assert index.add(folder, embedder).new == len(expected)
    index = Index.open(tmp_path / "index")
    assert index.cameras == sorted(map(os.fsdecode, FOLDERS))
    camera = os.fsdecode(FOLDERS[2])
    results = search(index, paths[:3], embedder=embedder, top=40, camera=[camera])
    assert {match.camera for match in results[0].matches} == {camera}
    sys.stdout.write(_table(results))
    write_page(tmp_path / "page.html", results, summary="x")
    json.dumps([match.path for match in results[0].matches]).encode()


def test_image_lists_keep_every_name(folder, tmp_path, expected):
    items = [(item.path, -1, item.camera) for item in read_image_folder(folder)]
    images = IndexedImages(items, read_rgb, None)
    assert images.fingerprint
    write_image_list(tmp_path, images)
    content = json.loads((tmp_path / "images.json").read_text())
    names = {os.path.relpath(row[0], folder) for row in content["images"]}
    assert set(expected) < names
