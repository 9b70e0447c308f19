"""``cluster`` from Python: folders, lists of images and features give the same clusters."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

import selcon_plugin
from helpers.networks import RowMeans
from selcon_plugin import Embedder, FolderClusters, FolderFeatures, cluster
from selcon_plugin.engine.image_check import BadImagesError
from selcon_plugin.features import BadFeaturesError
from selcon_plugin.models.inference import InferenceNetwork
from selcon_plugin.models.preprocessing import Preprocessing
from selcon_plugin.workflows.cluster_folder import cluster_folder

OPTIONS = {"eps": 0.5, "k1": 8, "k2": 1, "min_samples": 3}
COLORS = [(200, 30, 30), (30, 180, 40), (40, 40, 210)]


@pytest.fixture
def embedder():
    preprocessing = Preprocessing((16, 8), "bilinear", (128.0,) * 3, (64.0,) * 3)
    return Embedder(InferenceNetwork(RowMeans(), preprocessing, host="fastreid"))


@pytest.fixture
def folder(tmp_path):
    """Three people of 4, 6 and 8 images, of one color and its noise, by two cameras."""
    rng = np.random.default_rng(0)
    for person, color in enumerate(COLORS):
        for number in range(4 + 2 * person):
            noise = rng.integers(-20, 20, size=(48, 24, 3))
            pixels = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
            file = tmp_path / "crops" / f"cam{number % 2}" / f"{person}_{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
    return tmp_path / "crops"


def rows_of(file):
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_folder_is_clustered_as_by_the_command(embedder, folder, tmp_path):
    said = []
    found = cluster(folder, embedder, echo=said.append, **OPTIONS)
    assert isinstance(found, FolderClusters)
    assert found.sizes.tolist() == [8, 6, 4]
    people = [path.rpartition("/")[2][0] for path in found.paths]
    assert [people[image] for image in found.representatives] == ["2", "1", "0"]
    assert (found.num_clusters, found.num_outliers) == (3, 0)
    assert set(found.cameras) == {"cam0", "cam1"}
    assert any("k1 8, k2 1" in line for line in said)
    assert not (tmp_path / "out").exists()

    found.to_csv(tmp_path / "clusters.csv")
    arguments = {"network_key": "a", "options": OPTIONS}
    written = cluster_folder(lambda: embedder, folder, tmp_path / "out", **arguments)
    assert (tmp_path / "clusters.csv").read_bytes() == (
        tmp_path / "out" / "clusters.csv"
    ).read_bytes()
    assert np.array_equal(written.confidence, found.confidence)
    assert rows_of(tmp_path / "clusters.csv")[0]["image"] == "cam0/0_0.png"


def test_images_and_features_give_the_clusters_of_the_folder(embedder, folder):
    whole = cluster(folder, embedder, **OPTIONS)
    saved = embedder.embed_folder(folder)
    for images, network in (
        (list(whole.paths), embedder),
        ([Image.open(path) for path in whole.paths], embedder),
        (saved, None),
        (saved.features, None),
        (torch.from_numpy(saved.features), None),
    ):
        found = cluster(images, network, **OPTIONS)
        assert np.array_equal(found.labels, whole.labels)
        assert np.array_equal(found.confidence, whole.confidence)
        is_named = isinstance(images, FolderFeatures) or isinstance(images[0], str)
        rows = [str(row) for row in range(len(whole.paths))]
        assert list(found.paths) == (list(whole.paths) if is_named else rows)


def test_options_fit_the_number_of_images(embedder, folder, tmp_path, caplog):
    saved = embedder.embed_folder(folder)

    def unused():
        raise AssertionError("nothing is computed")

    few = "min_samples is 999, but there are 18 images.* use"
    with pytest.raises(ValueError, match=few):
        cluster(saved, **{**OPTIONS, "min_samples": 999})
    arguments = {"network_key": "a", "options": {"min_samples": 999}}
    with pytest.raises(ValueError, match=few):
        cluster_folder(unused, folder, tmp_path / "out", **arguments)
    cluster(folder, embedder, **{**OPTIONS, "k1": 999})
    assert caplog.text.count("k1 is 999, but there are 18 images") == 1


def test_cameras_are_names_or_numbers(embedder, folder, tmp_path):
    saved = embedder.embed_folder(folder)
    assert set(cluster(saved, **OPTIONS).cameras) == {"0", "1"}
    features = saved.features
    named = ["door", "", None, -1, 0, *["hall"] * (len(features) - 5)]
    found = cluster(features, cameras=named, **OPTIONS)
    assert list(found.cameras) == ["door", "", "", "", "0", *["hall"] * (len(features) - 5)]
    assert set(cluster(features, **OPTIONS).cameras) == {""}
    found.to_csv(tmp_path / "c.csv")
    rows = {row["image"]: row["camera"] for row in rows_of(tmp_path / "c.csv")}
    assert (rows["0"], rows["4"]) == ("door", "0")


def test_cameras_change_the_clusters_where_they_are_centered(monkeypatch):
    for name, value in (("MIN_IMAGES_PER_CAMERA", 6), ("PRIOR_IMAGES", 0)):
        monkeypatch.setattr(f"selcon_plugin.clustering.camera_centering.{name}", value)
    rng = np.random.default_rng(0)
    people = np.eye(8)[np.repeat([0, 1], 6)]
    tint = np.eye(8)[np.tile([5, 6], 6)] * 2.0
    raw = people + tint + rng.normal(size=(12, 8)) * 0.01
    features = (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32)
    by_camera = cluster(features, **OPTIONS).labels
    by_person = cluster(features, cameras=[0, 1] * 6, **OPTIONS).labels
    assert len(set(by_person[:6])) == 1
    assert len(set(by_person)) == 2
    assert not np.array_equal(by_camera, by_person)


def test_mistakes_name_the_argument(embedder, folder, tmp_path):
    features = np.eye(4, dtype=np.float32)
    for arguments, options, message in (
        ((str(folder),), {}, "embedder must be an Embedder"),
        ((str(folder), embedder), {"cameras": [1]}, "camera_pattern"),
        (([str(folder)],), {}, "embedder is None"),
        ((features, embedder), {}, "leave embedder out"),
        ((features,), {"cameras": [1]}, "one value for each of 4 images, got 1"),
        ((features,), {"cameras": "door"}, "cameras must be a list"),
        ((features,), {"labeler": "DBSCN"}, "DBSCAN"),
        ((features,), {"k3": 2}, "k1"),
        ((features,), {"eps": 2.0}, "eps must be"),
        ((features,), {"device": "cuda:99"}, "cuda:99"),
        (([], embedder), {}, "images are empty"),
        ((features[0],), {}, r"features of shape \(M, C\)"),
    ):
        with pytest.raises(ValueError, match=message):
            cluster(*arguments, **options)
    with pytest.raises(BadFeaturesError, match="the features to cluster"):
        cluster(2 * features)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        cluster(tmp_path / "nowhere", embedder)
    found = cluster(np.eye(8, dtype=np.float32), **OPTIONS)
    (tmp_path / "a.npz").touch()
    with pytest.raises(ValueError, match=r"a\.npz"):
        found.to_csv(tmp_path / "a.npz")


def test_unreadable_images_of_a_folder_are_left_out_or_refused(embedder, folder):
    (folder / "cam0" / "broken.png").write_bytes(b"no image")
    found = cluster(folder, embedder, max_unreadable_ratio=0.1, **OPTIONS)
    assert len(found.paths) == len(found.labels) == len(found.cameras) == 18
    with pytest.raises(BadImagesError):
        cluster(folder, embedder, max_unreadable_ratio=0.0, **OPTIONS)


def test_no_cluster_has_no_representative():
    found = cluster(np.eye(8, dtype=np.float32), **OPTIONS)
    assert found.num_outliers == 8
    assert found.representatives.shape == found.sizes.shape == (0,)


def test_names_are_public():
    assert {"cluster", "FolderClusters"} <= set(selcon_plugin.__all__)
