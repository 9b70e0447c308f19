import math

import numpy as np
import pytest
import torch
from sklearn.metrics import silhouette_samples

from selcon_plugin.clustering import build_labeler, jaccard_distance
from selcon_plugin.clustering.neighborhood import NeighborhoodSizes
from selcon_plugin.metrics.label_free import label_free_quality

SIZES = NeighborhoodSizes(k1=8, k2=2, min_samples=3)


def people(noise: float, *, num_people: int = 12, per_person: int = 8) -> torch.Tensor:
    """Sample features of persons: one direction each, with noise."""
    rng = torch.Generator().manual_seed(0)
    centers = torch.randn(num_people, 32, generator=rng)
    drawn = torch.randn(num_people * per_person, 32, generator=rng)
    return centers.repeat_interleave(per_person, dim=0) + noise * drawn


def test_well_separated_persons_score_high_and_are_found() -> None:
    found = label_free_quality(people(0.1), sizes=SIZES)
    assert (found.num_clusters, found.outlier_ratio, found.collapse) == (12, 0.0, "")
    assert found.value > 0.8


def test_the_criterion_decreases_with_the_noise() -> None:
    values = [label_free_quality(people(n), sizes=SIZES).value for n in (0.2, 0.6, 1.0)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 1.3 * values[2] > 0


def test_it_is_the_product_of_its_factors_as_defined() -> None:
    features = people(0.7)
    found = label_free_quality(features, sizes=SIZES)
    labeler = build_labeler("DBSCAN", eps="auto", **vars(SIZES))
    clusters = labeler(features)
    assert found.eps == clusters.measured["eps"]
    labels = clusters.labels.numpy()
    assert found.num_clusters == clusters.num_clusters

    dense = np.ones((len(labels), len(labels)))
    sparse = jaccard_distance(features, k1=8, k2=2, max_distance=0.9).tocoo()
    dense[sparse.row, sparse.col] = sparse.data
    np.fill_diagonal(dense, 0)
    inside = labels >= 0
    scores = silhouette_samples(
        dense[np.ix_(inside, inside)], labels[inside], metric="precomputed"
    )
    assert found.silhouette == pytest.approx(scores.sum() / len(labels))

    shared = total = 0.0
    for i in range(len(labels)):
        for j in range(len(labels)):
            if i != j:
                total += 1 - dense[i, j]
                shared += (1 - dense[i, j]) * (labels[i] == labels[j] >= 0)
    assert found.coverage == pytest.approx(shared / total)
    expected = found.silhouette * math.sqrt(found.coverage) * found.stability
    assert found.value == pytest.approx(expected)


def test_neither_scale_nor_rotation_matters() -> None:
    features = people(0.7)
    rotation, _ = torch.linalg.qr(torch.randn(32, 32, generator=torch.manual_seed(1)))
    plain = label_free_quality(features, sizes=SIZES)
    assert label_free_quality(7 * features, sizes=SIZES).value == pytest.approx(plain.value)
    turned = label_free_quality(features @ rotation, sizes=SIZES)
    assert turned.value == pytest.approx(plain.value, abs=1e-3)


def test_collapsed_features_score_zero_however_tight_their_clusters() -> None:
    few_directions = people(1e-3, num_people=3, per_person=32)
    found = label_free_quality(few_directions, sizes=SIZES)
    assert found.value == 0.0
    assert "few directions" in found.collapse
    assert found.coverage > 0.9


def test_no_clusters_is_zero() -> None:
    found = label_free_quality(torch.eye(40), sizes=SIZES)
    assert (found.value, found.num_clusters, found.outlier_ratio) == (0.0, 0, 1.0)
    assert label_free_quality(torch.zeros(0, 4)).value == 0.0
