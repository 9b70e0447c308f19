from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.metrics import adjusted_rand_score

from helpers.distances import sparse
from selcon_plugin.clustering import linkage as own_linkage
from selcon_plugin.clustering.linkage import average_linkage, average_linkage_labels


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
    nearest = own_linkage._nearest_clusters

    def counted(graph: scipy.sparse.csr_array, size: NDArray[np.int64]) -> object:
        rounds.append(len(size))
        return nearest(graph, size)

    monkeypatch.setattr(own_linkage, "_nearest_clusters", counted)
    assert not average_linkage_labels(sparse(np.full((300, 300), 0.5)), 0.5).any()
    # One merge per round would take 299 rounds. Twice as many images need one or two more.
    assert len(rounds) < 60


def test_input_is_not_modified() -> None:
    graph = sparse(random_distances(40, 0.3, seed=0))
    before = graph.copy()
    average_linkage_labels(graph, 0.9)
    assert (graph != before).nnz == 0


def test_cuts_of_one_hierarchy_are_the_partitions_of_each_threshold() -> None:
    dense = random_distances(100, 0.3, seed=3)
    hierarchy = average_linkage(sparse(dense))
    assert hierarchy.num_images == 100
    tree = linkage(squareform(dense), "average")
    for threshold in np.linspace(0, 1, 41):
        found = hierarchy.cut(threshold - 1e-9)
        assert same_partition(found, fcluster(tree, threshold - 1e-9, "distance"))
    below = np.sort(tree[:, 2])
    below = below[below < 1 - 1e-9]
    np.testing.assert_allclose(np.sort(hierarchy.height), below, atol=1e-6)


def test_hierarchy_without_merges_is_single_images() -> None:
    for num_images in (0, 1, 3):
        hierarchy = average_linkage(sparse(1 - np.eye(num_images)))
        assert hierarchy.cut(0.9).tolist() == list(range(num_images))
