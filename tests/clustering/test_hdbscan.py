from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.cluster import HDBSCAN
from sklearn.metrics import adjusted_rand_score

from helpers.distances import sparse
from selcon_plugin.clustering import HDBSCANLabeler
from selcon_plugin.clustering.hdbscan import hdbscan_labels, mutual_reachability


def blobs(sizes: list[int], seed: int, *, stragglers: int = 0) -> NDArray[np.float64]:
    """Distances inside groups of points, all different; 1 between groups."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(len(sizes)), sizes)
    group = np.concatenate([group, len(sizes) + np.arange(stragglers)])
    points = rng.normal(size=(len(group), 2))
    # Each group has two dense regions, which form nested clusters.
    points[rng.random(len(points)) < 0.5] += 4
    dense = np.linalg.norm(points[:, None] - points[None], axis=2)
    dense = 0.9 * dense / dense.max()
    dense[group[:, None] != group[None]] = 1
    order = rng.permutation(len(group))
    return dense[np.ix_(order, order)]


@pytest.mark.parametrize("min_samples", [1, 2, 4, 30])
def test_mutual_reachability_equals_its_definition(min_samples: int) -> None:
    dense = blobs([12, 9, 3], seed=0, stragglers=2)
    expected = np.zeros_like(dense)
    core = [sorted(row)[min(min_samples, len(row)) - 1] for row in dense]
    for i in range(len(dense)):
        for j in range(i + 1, len(dense)):
            reach = max(dense[i, j], core[i], core[j])
            expected[i, j] = reach if reach < 1 else 0
    found = mutual_reachability(sparse(dense), min_samples).toarray()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert (expected > 0).any() == (min_samples < 30)


# With one or two samples the core distance is never larger than a distance to another
# image, so only edges of length 1 have equal lengths.
@pytest.mark.parametrize("min_samples", [1, 2])
@pytest.mark.parametrize("selection", ["eom", "leaf"])
def test_equals_scikit_learn_on_the_dense_distances(
    min_samples: int, selection: str
) -> None:
    clusters = set()
    for seed in range(15):
        # An isolated group of four images is too small for a cluster.
        dense = blobs([40, 25, 30], seed, stragglers=4)
        model = HDBSCAN(
            min_cluster_size=5,
            min_samples=min_samples,
            metric="precomputed",
            cluster_selection_method=selection,
            copy=True,
        )
        expected = model.fit(dense).labels_
        found = hdbscan_labels(
            sparse(dense),
            min_cluster_size=5,
            min_samples=min_samples,
            cluster_selection=selection,
        )
        np.testing.assert_array_equal(found == -1, expected == -1)
        assert adjusted_rand_score(found, expected) == 1
        clusters.add(int(found.max()) + 1)
    assert min(clusters) >= 3
    assert len(clusters) > 1


def test_every_image_close_to_enough_others_is_clustered() -> None:
    dense = np.ones((9, 9))
    for members in ([0, 3, 5, 8], [1, 2, 4, 7]):
        dense[np.ix_(members, members)] = 0.3
    dense[6, 0] = dense[0, 6] = 0.5  # one neighbor is too few for min_samples = 4
    np.fill_diagonal(dense, 0)
    labels = hdbscan_labels(sparse(dense), min_cluster_size=4, min_samples=4)
    assert labels.tolist() in (
        [0, 1, 1, 0, 1, 0, -1, 1, 0],
        [1, 0, 0, 1, 0, 1, -1, 0, 1],
    )


def test_images_without_common_neighbors_form_no_cluster() -> None:
    dense = blobs([10, 10], seed=0, stragglers=20)
    labels = hdbscan_labels(sparse(dense), min_cluster_size=5, min_samples=2)
    isolated = (dense < 1).sum(axis=1) == 1
    assert isolated.sum() == 20
    assert (labels[isolated] == -1).all()
    assert len(set(labels[~isolated]) - {-1}) >= 2


@pytest.mark.parametrize("num_images", [0, 1, 2, 5])
def test_few_images_are_outliers(num_images: int) -> None:
    features = F.normalize(torch.randn(num_images, 8), dim=1)
    assert HDBSCANLabeler()(features).labels.tolist() == [-1] * num_images


def test_identical_images_do_not_fail() -> None:
    assert HDBSCANLabeler()(torch.ones(60, 8)).num_images == 60


def test_separate_persons_are_found(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    people = torch.arange(15).repeat_interleave(12)
    centers = torch.randn(15, 64, generator=generator)
    features = centers[people] + 0.2 * torch.randn(180, 64, generator=generator)
    found = HDBSCANLabeler(k1=10, k2=4)(features.to(device))
    assert torch.equal(found.labels, people)
    assert found.distance.shape == (180, 180)
