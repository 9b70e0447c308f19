from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.metrics import adjusted_rand_score

from selcon_plugin.clustering import AgglomerativeLabeler, PseudoLabels, agglomerative
from selcon_plugin.clustering.agglomerative import average_linkage_labels


def sparse(dense: NDArray[np.float64]) -> scipy.sparse.csr_array:
    """Store entries below 1, and the diagonal as a tiny number."""
    kept = dense < 1
    np.fill_diagonal(kept, True)
    row, column = np.nonzero(kept)
    data = np.maximum(dense[row, column], 1e-7)
    return scipy.sparse.csr_array((data, (row, column)), shape=dense.shape)


def random_distances(num_images: int, density: float, seed: int) -> NDArray[np.float64]:
    """Points in the plane; only some of their distances are below 1."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(num_images, 2)) + rng.integers(0, 4, (num_images, 1))
    dense = np.linalg.norm(points[:, None] - points[None], axis=2)
    dense /= np.quantile(dense, density)
    dropped = np.triu(rng.random(dense.shape) < 0.2)
    dense[(dense > 1) | dropped | dropped.T] = 1
    np.fill_diagonal(dense, 0)
    return dense


def same_partition(found: NDArray[np.int64], expected: NDArray[np.int64]) -> bool:
    return bool(adjusted_rand_score(found, expected) == 1)


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_equals_scipy_on_the_dense_distances(density: float) -> None:
    clusters = set()
    for seed in range(8):
        dense = random_distances(120, density, seed)
        tree = linkage(squareform(dense), "average")
        for threshold in (0.1, 0.4, 0.6, 0.8, 0.95, 0.999):
            found = average_linkage_labels(sparse(dense), threshold)
            assert same_partition(found, fcluster(tree, threshold, "distance"))
            clusters.add(int(found.max()) + 1)
    assert len(clusters) > 8


def test_clusters_merge_at_the_threshold_itself() -> None:
    dense = np.array([[0, 0.25, 0.5], [0.25, 0, 0.75], [0.5, 0.75, 0]])
    # 0 and 1 at 0.25; then {0, 1} and 2 at (0.5 + 0.75) / 2 = 0.625.
    assert average_linkage_labels(sparse(dense), 0.2).tolist() == [0, 1, 2]
    assert average_linkage_labels(sparse(dense), 0.25).tolist() == [0, 0, 1]
    assert average_linkage_labels(sparse(dense), 0.62).tolist() == [0, 0, 1]
    assert average_linkage_labels(sparse(dense), 0.625).tolist() == [0, 0, 0]


def test_distances_that_are_not_stored_count_as_one() -> None:
    dense = np.ones((3, 3))
    dense[0, 1] = dense[1, 0] = 0.1
    dense[1, 2] = dense[2, 1] = 0.5
    np.fill_diagonal(dense, 0)
    # {0, 1} and 2: (1 + 0.5) / 2
    assert average_linkage_labels(sparse(dense), 0.74).tolist() == [0, 0, 1]
    assert average_linkage_labels(sparse(dense), 0.76).tolist() == [0, 0, 0]


def test_clusters_without_a_stored_pair_are_not_merged() -> None:
    dense = np.ones((4, 4))
    dense[0, 1] = dense[1, 0] = dense[2, 3] = dense[3, 2] = 0.1
    assert average_linkage_labels(sparse(dense), 1.0).tolist() == [0, 0, 1, 1]


def test_order_of_images_does_not_matter() -> None:
    dense = random_distances(150, 0.3, seed=0)
    order = np.random.default_rng(1).permutation(150)
    found = average_linkage_labels(sparse(dense), 0.7)
    shuffled = average_linkage_labels(sparse(dense[np.ix_(order, order)]), 0.7)
    assert same_partition(shuffled, found[order])


def test_equal_distances_merge_in_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = []
    nearest = agglomerative._nearest_clusters

    def counted(graph: scipy.sparse.csr_array, size: NDArray[np.int64]) -> object:
        rounds.append(len(size))
        return nearest(graph, size)

    monkeypatch.setattr(agglomerative, "_nearest_clusters", counted)
    assert not average_linkage_labels(sparse(np.full((300, 300), 0.5)), 0.5).any()
    # One merge per round would take 299 rounds. Twice as many images need one or two more.
    assert len(rounds) < 60


def test_input_is_not_modified() -> None:
    graph = sparse(random_distances(40, 0.3, seed=0))
    before = graph.copy()
    average_linkage_labels(graph, 0.9)
    assert (graph != before).nnz == 0


def test_small_clusters_are_outliers() -> None:
    generator = torch.Generator().manual_seed(0)
    people = torch.tensor([0] * 12 + [1] * 3 + [2] * 12)
    centers = torch.randn(3, 64, generator=generator)
    features = centers[people] + 0.1 * torch.randn(27, 64, generator=generator)
    options = {"k1": 6, "k2": 2, "threshold": 0.9}
    kept = AgglomerativeLabeler(min_cluster_size=3, **options)(features)
    assert torch.equal(kept.labels, people)
    dropped = AgglomerativeLabeler(min_cluster_size=4, **options)(features)
    expected = PseudoLabels.numbered(torch.where(people == 1, -1, people))
    assert torch.equal(dropped.labels, expected.labels)


@pytest.mark.parametrize("num_images", [0, 1, 2, 3])
def test_few_images_are_outliers(num_images: int) -> None:
    features = F.normalize(torch.randn(num_images, 8), dim=1)
    assert AgglomerativeLabeler()(features).labels.tolist() == [-1] * num_images


def test_identical_images_are_one_cluster() -> None:
    found = AgglomerativeLabeler()(torch.ones(25, 8))
    assert found.labels.tolist() == [0] * 25


def test_separate_persons_are_found(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    people = torch.arange(15).repeat_interleave(12)
    centers = torch.randn(15, 64, generator=generator)
    features = centers[people] + 0.2 * torch.randn(180, 64, generator=generator)
    found = AgglomerativeLabeler(k1=10, k2=4)(features.to(device))
    assert torch.equal(found.labels, people)
