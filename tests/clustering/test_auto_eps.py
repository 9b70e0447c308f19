from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import scipy.sparse
import torch
from numpy.typing import NDArray

from selcon_plugin.clustering import (
    PseudoLabels,
    build_labeler,
    choose_eps,
    dbscan_labels,
)
from selcon_plugin.clustering import auto_eps as module
from selcon_plugin.clustering.auto_eps import EPS_GRID
from selcon_plugin.metrics.identities import cluster_diagnostics

DIM = 128
Data = Callable[[np.random.Generator], tuple[NDArray[np.float64], NDArray[np.int64]]]


def tight_balanced(
    rng: np.random.Generator,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """50 well separated identities of 12 images."""
    pids = np.repeat(np.arange(50), 12)
    return rng.normal(size=(50, DIM))[pids] + rng.normal(size=(len(pids), DIM)), pids


def imbalanced_with_cameras(
    rng: np.random.Generator,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """80 identities of 3 to 120 images from 6 cameras that shift the features."""
    sizes = np.clip(rng.pareto(1.2, 80) * 6 + 3, 3, 120).astype(int)
    pids = np.repeat(np.arange(80), sizes)
    camids = rng.integers(0, 6, len(pids))
    centers, shifts = rng.normal(size=(80, DIM)), 0.5 * rng.normal(size=(6, DIM))
    noise = 1.3 * rng.normal(size=(len(pids), DIM))
    return centers[pids] + shifts[camids] + noise, pids


def overlapping_with_distractors(
    rng: np.random.Generator,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """60 noisy identities of 12 images in 40 directions, and 200 single images."""
    pids = np.concatenate([np.repeat(np.arange(60), 12), np.arange(60, 260)])
    centers = rng.normal(size=(260, 40)) @ rng.normal(size=(40, DIM)) / np.sqrt(40)
    shifts = 0.3 * rng.normal(size=(6, DIM))[rng.integers(0, 6, len(pids))]
    return centers[pids] + shifts + 1.5 * rng.normal(size=(len(pids), DIM)), pids


def large_identities(
    rng: np.random.Generator,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """15 noisy identities of 100 images, most of which share no neighbor."""
    pids = np.repeat(np.arange(15), 100)
    noise = 2.0 * rng.normal(size=(len(pids), DIM))
    return rng.normal(size=(15, DIM))[pids] + noise, pids


def agreement(
    graph: scipy.sparse.csr_array, pids: NDArray[np.int64], eps: float
) -> tuple[float, float]:
    """Return the AMI with the identities, and the F1 score of the pairs."""
    labels = torch.from_numpy(dbscan_labels(graph, eps, 4))
    found = cluster_diagnostics(labels, torch.from_numpy(pids))
    precision, recall = np.nan_to_num([found["pair_precision"], found["pair_recall"]])
    return found["ami"], 2 * precision * recall / max(1e-9, precision + recall)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("make", "spread"),
    [  # smallest range of the AMI over the grid: tight clusters allow any eps
        (tight_balanced, 0.0),
        (imbalanced_with_cameras, 0.3),
        (overlapping_with_distractors, 0.8),
        (large_identities, 0.8),
    ],
)
def test_the_chosen_eps_is_nearly_the_best(make: Data, spread: float, seed: int) -> None:
    features, pids = make(np.random.default_rng(seed))
    found = build_labeler("DBSCAN", eps="auto")(features)
    eps = found.measured["eps"]
    assert eps in EPS_GRID
    expected = dbscan_labels(found.distance, eps, 4)
    assert torch.equal(found.labels, PseudoLabels.numbered(expected).labels)
    reached = np.array([agreement(found.distance, pids, e) for e in EPS_GRID])
    ami, pair_f = reached[EPS_GRID.index(eps)]
    assert np.ptp(reached[:, 0]) >= spread
    assert ami >= reached[:, 0].max() - 0.02
    assert pair_f >= reached[:, 1].max() - 0.05


def graph_of(dense: NDArray[np.float64]) -> scipy.sparse.csr_array:
    row, column = np.nonzero(dense < 1)
    data = np.maximum(dense[row, column], 1e-7)
    return scipy.sparse.csr_array((data, (row, column)), shape=dense.shape)


def two_groups(within: float, between: float) -> scipy.sparse.csr_array:
    dense = np.full((12, 12), between)
    dense[:6, :6] = dense[6:, 6:] = within
    np.fill_diagonal(dense, 0)
    return graph_of(dense)


def test_clusters_found_between_two_distances() -> None:
    """Below 0.35 all images are outliers; from 0.55 on there is one giant cluster."""
    graph = two_groups(0.35, 0.55)
    eps = choose_eps(graph, partial(dbscan_labels, graph, min_samples=4), 4)
    assert 0.35 <= eps < 0.55
    assert dbscan_labels(graph, eps, 4).tolist() == [0] * 6 + [1] * 6


def test_the_middle_of_a_plateau_is_taken() -> None:
    graph = two_groups(0.1, 1.0)  # every eps gives the same clusters
    asked = []

    def labels_at(eps: float) -> NDArray[np.int64]:
        asked.append(eps)
        return dbscan_labels(graph, eps, 4)

    middle = EPS_GRID[(len(EPS_GRID) - 1) // 2]
    assert choose_eps(graph, labels_at, 4) == middle
    assert asked == list(EPS_GRID)


def test_an_eps_without_core_images_is_not_tried() -> None:
    graph = two_groups(0.45, 1.0)
    asked = []

    def labels_at(eps: float) -> NDArray[np.int64]:
        asked.append(eps)
        return dbscan_labels(graph, eps, 4)

    choose_eps(graph, labels_at, 4)
    assert asked == [eps for eps in EPS_GRID if eps >= 0.45]


def test_the_only_eps_with_core_images_is_taken() -> None:
    """Enough core images may appear only at the last eps, as with a large min_samples."""
    graph = two_groups(0.8, 1.0)
    assert choose_eps(graph, partial(dbscan_labels, graph, min_samples=4), 4) == 0.8


@pytest.mark.parametrize(
    "graph",
    [
        pytest.param(two_groups(0.95, 1.0), id="all outliers"),
        pytest.param(two_groups(0.1, 0.1), id="one cluster"),
        pytest.param(scipy.sparse.csr_array((0, 0)), id="no image"),
    ],
)
def test_trivial_clusterings_fall_back_and_warn(
    graph: scipy.sparse.csr_array, caplog: pytest.LogCaptureFixture
) -> None:
    assert choose_eps(graph, partial(dbscan_labels, graph, min_samples=4), 4) == 0.6
    (record,) = caplog.records
    assert "no eps from 0.3 to 0.8" in record.getMessage()


def random_graph(seed: int) -> tuple[scipy.sparse.csr_array, NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    dense = np.minimum(1.0, 2 * rng.random((20, 20)))
    dense = np.maximum(dense, dense.T)
    np.fill_diagonal(dense, 0)
    return graph_of(dense), dense


@pytest.mark.parametrize("min_samples", [1, 2, 4, 30])
def test_core_distances_equal_sorted_rows(min_samples: int) -> None:
    graph, dense = random_graph(0)
    padded = np.pad(np.sort(dense, axis=1), ((0, 0), (0, 20)), constant_values=1)
    found = module._core_distances(graph, min_samples)
    np.testing.assert_allclose(found, padded[:, min_samples - 1], atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_coverage_equals_loops(seed: int) -> None:
    graph, dense = random_graph(seed)
    labels = np.random.default_rng(seed).integers(-1, 3, 20)
    inside = total = 0.0
    for i in range(20):
        for j in range(20):
            if i != j:
                total += 1 - dense[i, j]
                inside += (1 - dense[i, j]) * (labels[i] == labels[j] >= 0)
    assert module._coverage(graph, labels) == pytest.approx(inside / total)


def test_stability_is_the_smaller_agreement_with_the_neighbors() -> None:
    same, half = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 0, 1, 1, 1, 1])
    cut = module.adjusted_mutual_info(same, half)
    assert 0 < cut < 1
    found = module._stability([same, same, half, half, half])
    np.testing.assert_allclose(found, [1, cut, cut, 1, 1])
