import csv
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selcon_plugin.clustering.quality import adjusted_mutual_info
from selcon_plugin.workflows.cluster_links import link_clusters
from selcon_plugin.workflows.folder_clusters import (
    FolderClusters,
    chosen_labeler,
    cluster_features,
    default_options,
)


def unit(values):
    array = np.asarray(values, dtype=np.float32)
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def test_clusters_are_numbered_by_size() -> None:
    rng = np.random.default_rng(0)
    sizes = [4, 9, 6]
    centers = np.repeat(np.eye(16)[:3], sizes, axis=0)
    features = unit(centers + 0.01 * rng.normal(size=centers.shape))
    found = cluster_features(features, labeler="KMeans", options={"num_clusters": 3})
    assert found.labels.tolist() == [2] * 4 + [0] * 9 + [1] * 6


def test_features_are_centered_per_camera_if_cameras_are_known() -> None:
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(10), 30)
    cameras = np.tile(np.repeat(np.arange(3), 10), 10)
    tints = rng.normal(size=(3, 32))[cameras]
    features = unit(
        rng.normal(size=(10, 32))[people] + tints + 0.3 * rng.normal(size=(300, 32))
    )
    options = {"eps": 0.6, "k1": 30, "k2": 6, "min_samples": 4}
    assert adjusted_mutual_info(
        cluster_features(features, cameras, options=options).labels, people
    ) == pytest.approx(1.0)
    without = cluster_features(features, options=options)
    assert adjusted_mutual_info(without.labels, people) < 0.8
    unknown = np.full(300, -1)
    assert without.labels.equal(cluster_features(features, unknown, options=options).labels)


@pytest.mark.parametrize(
    ("labeler", "expected"),
    [
        ("Agglomerative", {"threshold", "k1", "k2", "min_cluster_size"}),
        ("DBSCAN", {"eps", "k1", "k2", "min_samples"}),
        ("HDBSCAN", {"min_cluster_size", "k1", "k2", "min_samples"}),
        ("KMeans", {"num_clusters"}),
    ],
)
def test_by_default_a_labeler_chooses_for_itself(labeler, expected) -> None:
    names = expected | {"images_per_person"}
    assert default_options(labeler) == dict.fromkeys(names, "auto")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (None, "Agglomerative"),
        ({"threshold": 0.7, "images_per_person": 4}, "Agglomerative"),
        ({"eps": 0.5}, "DBSCAN"),
        ({"min_samples": 3, "k1": 9}, "DBSCAN"),
        ({"eps": 0.5, "threshold": 0.7}, "Agglomerative"),
        ({"center_cameras": True, "eps": 0.5}, "DBSCAN"),
    ],
)
def test_options_choose_the_labeler(options, expected) -> None:
    assert chosen_labeler("", options) == expected
    assert chosen_labeler("HDBSCAN", options) == "HDBSCAN"


def test_unknown_labeler_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="did you mean DBSCAN"):
        default_options("DBSCANN")


@pytest.fixture
def clusters(tmp_path: Path) -> FolderClusters:
    paths = []
    for place in ("b/x.png", "a/x.png", "a/y,1.png", "z.png"):
        path = tmp_path / "images" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 8)).save(path)
        paths.append(str(path))
    confidence = np.array([0.5, 0.75, 0.9, 0.0], dtype=np.float32)
    return FolderClusters(
        paths,
        ["b", "a", "a", ""],
        np.array([0, 0, 0, -1]),
        confidence,
        cohesion=np.array([0.625], dtype=np.float32),
    )


def test_table_has_one_row_per_image_sorted_by_name(
    clusters: FolderClusters, tmp_path: Path
) -> None:
    replace(clusters, folder=str(tmp_path / "images")).to_csv(tmp_path / "clusters.csv")
    with open(tmp_path / "clusters.csv", newline="") as stream:
        rows = list(csv.reader(stream))
    assert rows == [
        ["image", "cluster", "confidence", "camera", "cohesion"],
        ["a/x.png", "0", "0.7500", "a", "0.6250"],
        ["a/y,1.png", "0", "0.9000", "a", "0.6250"],
        ["b/x.png", "0", "0.5000", "b", "0.6250"],
        ["z.png", "-1", "0.0000", "", ""],
    ]


def test_links_are_relative_and_lead_to_the_images(
    clusters: FolderClusters, tmp_path: Path
) -> None:
    links = tmp_path / "out" / "links"
    for _ in range(2):  # the second call replaces the links of the first
        link_clusters(clusters, links)
    names = sorted(file.relative_to(links).as_posix() for file in links.rglob("*.png"))
    assert names == [
        "0000/0000_y,1.png",
        "0000/0001_x.png",
        "0000/0002_x.png",
        "outliers/0000_z.png",
    ]
    link = links / "0000" / "0001_x.png"
    assert not os.path.isabs(os.readlink(link))
    assert link.resolve() == Path(clusters.paths[1]).resolve()
    assert os.readlink(link) == "../../../images/a/x.png"


def test_hard_links_replace_unsupported_symbolic_links(
    clusters: FolderClusters, tmp_path: Path, monkeypatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    for _ in range(2):
        link_clusters(clusters, tmp_path / "links")
    assert (tmp_path / "links/0000/0000_y,1.png").samefile(clusters.paths[2])


def test_other_files_are_never_removed(clusters: FolderClusters, tmp_path: Path) -> None:
    own = tmp_path / "links" / "0000" / "notes.txt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        link_clusters(clusters, tmp_path / "links")
    assert own.read_text() == "mine"


@pytest.mark.parametrize("kind", ["hard link", "symbolic link", "hard link to an image"])
@pytest.mark.parametrize("place", ["0000/mine.png", "0000/0009_mine.png", "mine.png"])
def test_links_of_a_user_stay(
    clusters: FolderClusters, tmp_path: Path, kind: str, place: str
) -> None:
    links = tmp_path / "links"
    link_clusters(clusters, links)
    mine = tmp_path / "mine.png"
    mine.write_text("mine")
    target = clusters.paths[0] if kind == "hard link to an image" else mine
    (os.symlink if kind == "symbolic link" else os.link)(target, links / place)
    before = sorted(str(file) for file in links.rglob("*"))
    with pytest.raises(ValueError, match=r"mine\.png"):
        link_clusters(clusters, links)
    assert sorted(str(file) for file in links.rglob("*")) == before
    (links / place).unlink()
    link_clusters(clusters, links)


def test_a_link_that_a_user_has_changed_stays(
    clusters: FolderClusters, tmp_path: Path
) -> None:
    links, mine = tmp_path / "links", tmp_path / "mine.png"
    link_clusters(clusters, links)
    mine.write_text("mine")
    (links / "0000/0001_x.png").unlink()
    os.link(mine, links / "0000/0001_x.png")
    with pytest.raises(ValueError, match=r"0001_x\.png"):
        link_clusters(clusters, links)
    assert mine.stat().st_nlink == 2


def test_links_lead_to_the_images_where_the_folder_is_reached_by_a_link(
    clusters: FolderClusters, tmp_path: Path
) -> None:
    (tmp_path / "deep/real").mkdir(parents=True)
    (tmp_path / "short").symlink_to(tmp_path / "deep/real")
    for _ in range(2):
        link_clusters(clusters, tmp_path / "short/links")
    link = tmp_path / "short/links/0000/0001_x.png"
    assert link.resolve() == Path(clusters.paths[1]).resolve()
