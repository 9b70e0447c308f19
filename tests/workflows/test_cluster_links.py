"""Links by cluster: what a user put into their folder stays, and any name is linked."""

import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from selcon_plugin.datasets import read_image_folder
from selcon_plugin.io.tables import read_table
from selcon_plugin.report.sheets import SheetRow, contact_sheet
from selcon_plugin.workflows.cluster_links import link_clusters
from selcon_plugin.workflows.folder_clusters import FolderClusters

NAMES = [
    b"=cmd|' /C calc'!A0/a.png",
    b"+1/\x1b]0;title\x07x.png",
    b"-b/M\xfcller.png",
    b"@c/two\nlines.png",
    "\u4eba".encode() * 80 + b".png",
    b"-x.png",
    b"100%s {0}.png",
]


@pytest.fixture
def clusters(tmp_path):
    paths = []
    for name in NAMES:
        path = os.fsencode(tmp_path) + b"/images/" + name
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as stream:
            Image.new("RGB", (4, 8)).save(stream, "PNG")
        paths.append(os.fsdecode(path))
    labels = np.zeros(len(paths), dtype=np.int64)
    cameras = [os.path.basename(os.path.dirname(path)) for path in paths]
    return FolderClusters(paths, cameras, labels, np.ones(len(paths), dtype=np.float32))


def test_any_name_is_linked_and_written_and_read_back(clusters, tmp_path):
    link_clusters(clusters, tmp_path / "links")
    links = sorted((tmp_path / "links" / "0000").iterdir())
    assert [os.path.realpath(link) for link in links] == list(clusters.paths)
    assert all(len(os.fsencode(link.name)) <= 255 for link in links)
    assert all(link.suffix == ".png" for link in links)
    replace(clusters, folder=str(tmp_path / "images")).to_csv(tmp_path / "clusters.csv")
    rows = read_table(tmp_path / "clusters.csv")
    assert [row["image"] for row in rows] == sorted(map(os.fsdecode, NAMES))
    assert {row["camera"] for row in rows} == set(clusters.cameras)
    text = (tmp_path / "clusters.csv").read_text()
    assert text.replace("\n", "").isprintable()
    assert not any(line.startswith(tuple("=+-@")) for line in text.splitlines())


def test_links_and_sheets_are_not_taken_for_images(clusters, tmp_path):
    images = tmp_path / "images"
    link_clusters(clusters, images / "clusters" / "links")
    contact_sheet(images / "my_sheet.jpg", [SheetRow("a", clusters.paths)])
    contact_sheet(images / "sheets.png", [SheetRow("a", clusters.paths)])
    assert len(read_image_folder(images)) == len(NAMES)


@pytest.mark.parametrize("kind", ["hard link", "symbolic link", "file", "folder link"])
@pytest.mark.parametrize("place", ["mine.png", "0000/mine.png", "mine/0000_a.png"])
def test_what_a_user_put_there_stays(clusters, tmp_path, kind, place):
    links = tmp_path / "links"
    link_clusters(clusters, links)
    own = tmp_path / "own.png"
    own.write_bytes(b"mine")
    (links / place).parent.mkdir(exist_ok=True)
    if kind == "hard link":
        os.link(own, links / place)
    elif kind == "file":
        (links / place).write_bytes(b"mine")
    else:
        (links / place).symlink_to(tmp_path if kind == "folder link" else own)
    with pytest.raises(ValueError, match=r"mine"):
        link_clusters(clusters, links)
    assert os.path.lexists(links / place)
    assert len(list((links / "0000").glob("000*"))) == len(NAMES)  # nothing is removed


def test_a_hard_link_to_another_file_stays_whatever_its_name(clusters, tmp_path):
    links = tmp_path / "links"
    link_clusters(clusters, links)
    (tmp_path / "own.png").write_bytes(b"mine")
    os.link(tmp_path / "own.png", links / "0000" / "0099_own.png")
    with pytest.raises(ValueError, match=r"0099_own\.png"):
        link_clusters(clusters, links)


def test_a_folder_that_is_a_link_is_refused(clusters, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "links").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"links would be replaced"):
        link_clusters(clusters, tmp_path / "links")
