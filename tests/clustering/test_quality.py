from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.metrics import adjusted_mutual_info_score, silhouette_score
from sklearn.metrics import silhouette_samples as dense_silhouettes

from selcon_plugin.clustering import PseudoLabels, cluster_quality, label_stability
from selcon_plugin.clustering import quality as module
from selcon_plugin.clustering.quality import (
    adjusted_mutual_info,
    contingency,
    silhouette_samples,
)


def random_distances(
    num_images: int, seed: int, stored: float = 0.3
) -> tuple[sparse.csr_array, NDArray[np.float64]]:
    """Return symmetric distances, sparse and dense; missing entries are 1."""
    rng = np.random.default_rng(seed)
    dense = rng.random((num_images, num_images))
    dense[rng.random(dense.shape) > stored] = 1
    dense = np.minimum(dense, dense.T)
    np.fill_diagonal(dense, 0)
    row, column = np.nonzero(dense < 1)
    data = np.maximum(dense[row, column], 1e-7)
    return sparse.csr_array((data, (row, column)), shape=dense.shape), dense


def random_labels(num_images: int, num_clusters: int, seed: int) -> NDArray[np.int64]:
    raw = np.random.default_rng(seed).integers(-1, num_clusters, num_images)
    return PseudoLabels.numbered(raw).labels.numpy()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_clusters", [2, 7, 35])  # 35 of 60 images: many singletons
def test_silhouette_equals_scikit_learn_on_the_clustered_images(
    seed: int, num_clusters: int
) -> None:
    graph, dense = random_distances(60, seed)
    labels = random_labels(60, num_clusters, seed)
    inside = labels >= 0
    kept = dense[np.ix_(inside, inside)]
    found = silhouette_samples(graph, labels)
    assert np.isnan(found[~inside]).all()
    expected = dense_silhouettes(kept, labels[inside], metric="precomputed")
    np.testing.assert_allclose(found[inside], expected, rtol=0, atol=1e-6)
    measured = cluster_quality(PseudoLabels(torch.from_numpy(labels), distance=graph))
    score = silhouette_score(kept, labels[inside], metric="precomputed")
    assert measured["silhouette"] == pytest.approx(score, abs=1e-6)


def test_silhouette_by_hand() -> None:
    dense = np.ones((5, 5))
    for a, b, distance in [(0, 1, 0.2), (0, 2, 0.6), (1, 2, 0.4), (2, 3, 0.5)]:
        dense[a, b] = dense[b, a] = distance
    row, column = np.nonzero(dense < 1)
    graph = sparse.csr_array((dense[row, column], (row, column)), shape=(5, 5))
    found = silhouette_samples(graph, np.array([0, 0, 0, 1, 1]))
    a = np.array([0.4, 0.3, 0.5, 1, 1])
    b = np.array([1, 1, (0.5 + 1) / 2, (1 + 1 + 0.5) / 3, 1])
    np.testing.assert_allclose(found, (b - a) / np.maximum(a, b), atol=1e-7)


def test_silhouette_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, _ = random_distances(60, seed=0)
    labels = random_labels(60, 7, seed=0)
    expected = silhouette_samples(graph, labels)
    monkeypatch.setattr(module, "_CHUNK_ENTRIES", 100)  # a few rows at a time
    np.testing.assert_array_equal(silhouette_samples(graph, labels), expected)


@pytest.mark.parametrize("first_clusters", [1, 5, 40, 200])
@pytest.mark.parametrize("second_clusters", [1, 30, 200])
def test_adjusted_mutual_info_equals_scikit_learn(
    first_clusters: int, second_clusters: int
) -> None:
    rng = np.random.default_rng(first_clusters)
    first = rng.integers(0, first_clusters, 200)
    for fraction in (0.0, 0.7, 1.0):
        second = rng.integers(0, second_clusters, 200)
        second = np.where(rng.random(200) < fraction, first, second)
        expected = adjusted_mutual_info_score(first, second)
        assert adjusted_mutual_info(first, second) == pytest.approx(expected, abs=1e-9)


def test_adjusted_mutual_info_of_special_partitions() -> None:
    three, singletons, one = (
        np.array([0, 0, 1, 2, 2]),
        np.arange(5),
        np.zeros(5, dtype=np.int64),
    )
    assert adjusted_mutual_info(three, 7 - three) == 1.0
    assert adjusted_mutual_info(singletons, singletons[::-1]) == 1.0
    assert adjusted_mutual_info(one, one) == 1.0
    assert adjusted_mutual_info(three, one) == pytest.approx(0, abs=1e-12)
    assert adjusted_mutual_info(three, singletons) == pytest.approx(0, abs=1e-12)


def test_adjusted_mutual_info_of_thousands_of_clusters_is_fast() -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 8000, 100_000)
    second = np.where(rng.random(100_000) < 0.8, first, rng.integers(0, 8000, 100_000))
    started = time.perf_counter()
    assert 0.5 < adjusted_mutual_info(first, second) < 0.9
    assert time.perf_counter() - started < 5  # it takes 0.01 s; 40 s over all pairs


def test_contingency_equals_a_loop() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 4, 30), rng.integers(-3, 3, 30)
    names = np.unique(first), np.unique(second)
    expected = np.zeros((len(names[0]), len(names[1])))
    for a, b in zip(first, second, strict=True):
        expected[np.searchsorted(names[0], a), np.searchsorted(names[1], b)] += 1
    np.testing.assert_array_equal(contingency(first, second).toarray(), expected)


def test_stability_is_taken_over_the_images_clustered_in_both() -> None:
    labels = torch.tensor([0, 0, 1, 1, -1, 2, -1])
    previous = torch.tensor([1, 1, 0, 0, 2, -1, -1])
    assert label_stability(labels, previous) == 1.0
    previous[0] = 0
    expected = adjusted_mutual_info_score([0, 0, 1, 1], [0, 1, 0, 0])
    assert label_stability(labels, previous) == pytest.approx(expected)
    assert math.isnan(label_stability(labels, torch.full((7,), -1)))
    with pytest.raises(ValueError, match=r"same images, got shapes \(7,\) and \(6,\)"):
        label_stability(labels, previous[:6])


def test_counts_and_sizes_by_hand() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, -1, -1])
    assert cluster_quality(PseudoLabels(labels), labels) == {
        "num_clusters": 3,
        "outlier_ratio": 0.2,
        "mean_cluster_size": pytest.approx(8 / 3),
        "median_cluster_size": 2,
        "max_cluster_size": 4,
        "stability": 1.0,
    }


@pytest.mark.parametrize("labels", [[], [-1, -1], [0, 0, -1]])
def test_fewer_than_two_clusters_have_no_silhouette(labels: list[int]) -> None:
    graph = sparse.csr_array((len(labels), len(labels)))
    quality = cluster_quality(PseudoLabels.numbered(labels, distance=graph))
    assert "silhouette" not in quality
    assert quality["max_cluster_size"] == (2 if 0 in labels else 0)
