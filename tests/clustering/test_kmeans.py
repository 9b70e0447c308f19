from __future__ import annotations

import importlib.util
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import adjusted_mutual_info_score, silhouette_score
from torch import Tensor

from selcon_plugin.clustering import KMeansLabeler, kmeans
from selcon_plugin.clustering.kmeans import choose_num_clusters

HAS_FAISS = importlib.util.find_spec("faiss") is not None


@pytest.fixture(
    params=[
        pytest.param(
            "faiss",
            marks=pytest.mark.skipif(not HAS_FAISS, reason="faiss is not installed"),
        ),
        "scikit-learn",
    ]
)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "scikit-learn":
        monkeypatch.setattr(kmeans.importlib.util, "find_spec", lambda name: None)
    return str(request.param)


def people(num: int, images: int, noise: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pids = torch.arange(num).repeat_interleave(images)
    centers = torch.randn(num, 32, generator=generator)
    features = centers[pids] + noise * torch.randn(len(pids), 32, generator=generator)
    return F.normalize(features, dim=1), pids


def test_separate_persons_are_found(backend: str, device: str) -> None:
    features, pids = people(25, 12, noise=0.3)
    found = KMeansLabeler(num_clusters=25)(features.to(device))
    assert torch.equal(found.labels, pids)


def test_every_image_is_nearest_to_its_own_center(backend: str) -> None:
    # For overlapping persons, test the condition at which k-means converges.
    features, _ = people(12, 20, noise=1.5)
    labels = KMeansLabeler(num_clusters=10)(features).labels
    means = torch.stack([features[labels == cluster].mean(dim=0) for cluster in range(10)])
    if backend == "faiss":
        nearest = (features @ F.normalize(means, dim=1).T).argmax(dim=1)
    else:
        nearest = torch.cdist(features, means).argmin(dim=1)
    assert torch.equal(nearest, labels)


def test_equal_features_give_equal_labels(backend: str) -> None:
    features, _ = people(30, 10, noise=1.5)
    first, second = (KMeansLabeler(num_clusters=40)(features) for _ in range(2))
    assert torch.equal(first.labels, second.labels)
    assert first.num_outliers == 0


def test_start_from_a_sample(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "_START_IMAGES_PER_CLUSTER", 3)
    features, pids = people(5, 40, noise=0.1)
    assert torch.equal(KMeansLabeler(num_clusters=5)(features).labels, pids)


@pytest.mark.parametrize("num_images", [0, 1, 2, 6])
def test_fewer_images_than_clusters(
    backend: str, num_images: int, caplog: pytest.LogCaptureFixture
) -> None:
    features = F.normalize(torch.eye(8)[:num_images], dim=1)
    with caplog.at_level(logging.WARNING):
        found = KMeansLabeler(num_clusters=7)(features)
    assert found.labels.tolist() == list(range(num_images))
    assert f"{num_images} images cannot form 7 clusters" in caplog.text


def test_empty_clusters_are_dropped(backend: str) -> None:
    features = torch.eye(4).repeat(10, 1)
    found = KMeansLabeler(num_clusters=9)(features)
    assert found.num_clusters == 4
    assert found.labels.tolist() == [0, 1, 2, 3] * 10


@pytest.mark.parametrize(("num", "images"), [(2, 20), (6, 4), (12, 4), (25, 12), (40, 3)])
def test_without_a_number_small_sets_get_about_that_of_their_persons(
    backend: str, num: int, images: int, caplog: pytest.LogCaptureFixture
) -> None:
    features, pids = people(num, images, noise=0.3)
    with caplog.at_level(logging.WARNING):
        found = KMeansLabeler()(features)
    assert num / 1.15 <= found.num_clusters <= num * 1.15
    assert adjusted_mutual_info_score(pids, found.labels) > 0.9
    assert not caplog.records


@pytest.mark.parametrize("num_images", range(9))
def test_without_a_number_the_fewest_images_are_clustered(
    backend: str, num_images: int, caplog: pytest.LogCaptureFixture
) -> None:
    features = F.normalize(torch.randn(9, 8, generator=torch.Generator().manual_seed(0)))
    with caplog.at_level(logging.WARNING):
        found = KMeansLabeler()(features[:num_images])
        copies = KMeansLabeler()(features[:num_images].repeat(3, 1))
    largest = max(2, num_images // 2)
    assert min(num_images, 2) <= found.num_clusters <= largest
    assert copies.num_clusters == found.num_clusters
    assert not caplog.records


def test_the_chosen_number_has_the_best_silhouette() -> None:
    features = people(9, 7, noise=1.0)[0].numpy()
    tree = kmeans.linkage(features, "ward")
    cuts = (kmeans.fcluster(tree, count, "maxclust") for count in kmeans._grid(31))
    best = max(cuts, key=lambda labels: silhouette_score(features, labels))
    assert choose_num_clusters(features) == best.max()


def test_large_sets_have_the_published_ratio() -> None:
    """12,936 images of Market-1501 get 760 clusters; 3C uses 750."""
    features = np.zeros((12_936, 1), dtype=np.float32)
    assert choose_num_clusters(features) == 760
