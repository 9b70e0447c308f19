from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from numpy.typing import NDArray
from sklearn.cluster import DBSCAN

from selcon_plugin.clustering import PseudoLabels, build_labeler
from selcon_plugin.clustering.auto_eps import EPS_GRID
from selcon_plugin.clustering.dbscan import DBSCANLabeler, dbscan_labels
from selcon_plugin.clustering.jaccard import jaccard_distance

GOLDEN = Path(__file__).parent.parent / "golden"


def sparse(dense: NDArray[np.float32], limit: float = 1.0) -> scipy.sparse.csr_array:
    """Store entries below the limit, and the diagonal."""
    kept = dense < limit
    np.fill_diagonal(kept, True)
    row, column = np.nonzero(kept)
    data = np.maximum(dense[row, column], np.float32(1e-7))
    return scipy.sparse.csr_array((data, (row, column)), shape=dense.shape)


def random_graph(seed: int) -> scipy.sparse.csr_array:
    rng = np.random.default_rng(seed)
    num_images = int(rng.integers(1, 60))
    dense = rng.random((num_images, num_images), dtype=np.float32)
    dense[rng.random(dense.shape) < 0.1] = 0.2  # many distances equal eps exactly
    dense = np.minimum(dense, dense.T)
    np.fill_diagonal(dense, 0)
    return sparse(dense, limit=float(rng.choice([0.25, 0.6, 1.0])))


def reference(graph: scipy.sparse.csr_array, eps: float, min_samples: int) -> list[int]:
    model = DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed")
    return model.fit(graph).labels_.tolist()


@pytest.mark.parametrize("eps", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("min_samples", [1, 2, 4, 8])
def test_equals_scikit_learn_including_cluster_numbers(
    eps: float, min_samples: int
) -> None:
    clusters = 0
    for seed in range(25):
        graph = random_graph(seed)
        found = dbscan_labels(graph, eps, min_samples)
        assert found.tolist() == reference(graph, eps, min_samples)
        clusters += found.max() + 1
    assert clusters > 0


def test_eps_is_compared_in_the_precision_of_the_distances() -> None:
    # float32(0.6) is larger than 0.6, but the pair counts, as for scikit-learn.
    graph = sparse(np.array([[0, 0.6], [0.6, 0]], dtype=np.float32))
    for eps in (0.6, float(np.float64(0.6))):
        assert dbscan_labels(graph, eps, 2).tolist() == [0, 0]
    assert dbscan_labels(graph, np.float64(0.6), 2).tolist() == [0, 0]
    assert reference(graph, 0.6, 2) == [0, 0]


def test_border_image_joins_the_first_numbered_cluster_of_its_core_neighbors() -> None:
    # Images 0-2 and 4-6 are two triangles; 3 is near one corner of each.
    dense = np.ones((7, 7), dtype=np.float32)
    for group in ([0, 1, 2], [4, 5, 6]):
        dense[np.ix_(group, group)] = 0.3
    dense[3, [2, 4]] = dense[[2, 4], 3] = 0.3
    np.fill_diagonal(dense, 0)
    # If 4 images are required, only 2 and 4 are core; with 3, all are, and 3 joins both.
    assert dbscan_labels(sparse(dense), 0.5, 4).tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert dbscan_labels(sparse(dense), 0.5, 3).tolist() == [0] * 7


def test_the_diagonal_need_not_be_stored() -> None:
    dense = np.array([[0, 0.3, 0], [0.3, 0, 0], [0, 0, 0]], dtype=np.float32)
    assert dbscan_labels(scipy.sparse.csr_array(dense), 0.5, 2).tolist() == [0, 0, -1]


@pytest.mark.parametrize("name", ["a", "b"])
def test_golden_labels_up_to_renaming(name: str) -> None:
    golden = np.load(GOLDEN / f"jaccard_{name}.npz")
    k1, k2, eps, min_samples = golden["hyper"].tolist()
    expected = PseudoLabels.numbered(golden["labels"])
    assert expected.num_clusters > 20
    dense = dbscan_labels(sparse(golden["jaccard"]), eps, int(min_samples))
    assert PseudoLabels.numbered(dense).labels.tolist() == expected.labels.tolist()
    labeler = build_labeler(
        "DBSCAN", eps=eps, min_samples=int(min_samples), k1=int(k1), k2=int(k2)
    )
    found = labeler(golden["features"])
    assert found.labels.tolist() == expected.labels.tolist()
    assert found.measured["eps"] == eps


@pytest.mark.parametrize("num_images", [0, 1, 2, 5])
@pytest.mark.parametrize("eps", [0.6, "auto"])
def test_few_or_identical_images(num_images: int, eps: float | str) -> None:
    found = build_labeler("DBSCAN", eps=eps)(torch.ones(num_images, 3))
    assert found.labels.tolist() == ([0] * 5 if num_images == 5 else [-1] * num_images)
    assert dbscan_labels(found.distance, 0.5, 1).tolist() == [0] * num_images


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(15, 32, generator=generator).repeat_interleave(10, dim=0)
    return centers + 1.2 * torch.randn(150, 32, generator=generator)


def test_the_graph_reaches_beyond_eps_by_the_margin(features: torch.Tensor) -> None:
    full = jaccard_distance(features).toarray()
    for labeler, limit in (
        (build_labeler("DBSCAN", eps=0.5, graph_margin=0.2), 0.7),
        (build_labeler("DBSCAN", eps=0.5), 0.6),
        (build_labeler("DBSCAN", eps="auto", graph_margin=0.05), EPS_GRID[-1] + 0.05),
        (build_labeler("DBSCAN", eps=0.95), 1.0),
    ):
        graph = labeler(features).distance
        assert graph.nnz == np.count_nonzero((full > 0) & (full <= limit))
        assert graph.nnz > features.shape[0]


@pytest.mark.parametrize("change", [-0.1, 0.0, 0.1])
def test_labels_at_changes_eps(features: torch.Tensor, change: float) -> None:
    labeler = build_labeler("DBSCAN", eps=0.5)
    found = labeler(features)
    expected = build_labeler("DBSCAN", eps=0.5 + change)(features).labels
    again = PseudoLabels.numbered(labeler.labels_at(found, change)).labels
    assert torch.equal(again, expected)
    assert torch.equal(again, found.labels) == (change == 0.0)


def test_labels_beyond_the_graph_are_refused(features: torch.Tensor) -> None:
    labeler = DBSCANLabeler(eps=0.5, graph_margin=0.1)
    with pytest.raises(
        ValueError, match=r"up to eps \+ 0.1, .*raise graph_margin .*to 0.2"
    ):
        labeler.labels_at(labeler(features), 0.2)


@pytest.mark.gpu
def test_features_on_the_gpu_give_the_same_labels(features: torch.Tensor) -> None:
    labeler = build_labeler("DBSCAN")
    assert torch.equal(labeler(features.cuda()).labels, labeler(features).labels)


@pytest.mark.parametrize(
    ("eps", "min_samples", "message"),
    [
        (-0.1, 4, "eps .*>= 0.*got -0.1"),
        (float("nan"), 4, "eps .*>= 0.*got nan"),
        (0.5, 0, "min_samples .*1.*got 0"),
    ],
)
def test_wrong_arguments_are_named(eps: float, min_samples: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dbscan_labels(random_graph(0), eps, min_samples)
