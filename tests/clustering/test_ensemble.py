from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from selcon_plugin.clustering import DBSCANLabeler, EnsembleLabeler, PseudoLabels
from selcon_plugin.clustering.ensemble import (
    agreement_labels,
    cluster_agreement,
    co_association,
)


def random_labelings(num_labelings: int, seed: int) -> NDArray[np.int64]:
    """Return variations of one clustering of 40 images, including outliers."""
    rng = np.random.default_rng(seed)
    labels = np.tile(rng.integers(-1, 8, 40), (num_labelings, 1))
    changed = rng.random(labels.shape) < 0.3
    labels[changed] = rng.integers(-1, 8, changed.sum())
    return labels


def pair_shares(labelings: NDArray[np.int64]) -> NDArray[np.float64]:
    """Compute the co-association by its definition, pair by pair."""
    num_labelings, num_images = labelings.shape
    fractions = np.zeros((num_images, num_images))
    for i in range(num_images):
        for j in range(num_images):
            for labels in labelings:
                fractions[i, j] += labels[i] == labels[j] != -1
    return fractions / num_labelings


@pytest.mark.parametrize("num_labelings", [1, 3, 4])
def test_co_association_equals_its_definition(num_labelings: int) -> None:
    labelings = random_labelings(num_labelings, seed=0)
    images = np.arange(40)
    found = co_association(labelings, images[:, None], images)
    np.testing.assert_array_equal(found, pair_shares(labelings))


@pytest.mark.parametrize("num_labelings", [1, 2, 3, 4])
@pytest.mark.parametrize("agreement", [0.0, 0.25, 0.5, 0.67, 0.99])
def test_clusters_are_the_components_of_agreeing_pairs(
    num_labelings: int, agreement: float
) -> None:
    clusters = 0
    for seed in range(6):
        labelings = random_labelings(num_labelings, seed)
        joined = pair_shares(labelings) > agreement
        expected = np.full(40, -1)
        for start in range(40):
            reached, waiting = set(), [start]
            while waiting:  # images connected by agreeing pairs
                image = waiting.pop()
                if image not in reached:
                    reached.add(image)
                    waiting += np.flatnonzero(joined[image]).tolist()
            if len(reached) > 1:
                expected[start] = min(reached)
        found = PseudoLabels.numbered(agreement_labels(labelings, agreement))
        assert torch.equal(found.labels, PseudoLabels.numbered(expected).labels)
        clusters += found.num_clusters
    assert clusters > 0


@pytest.mark.parametrize("num_labelings", [1, 3])
def test_cluster_agreement_equals_its_definition(num_labelings: int) -> None:
    *labelings, labels = random_labelings(num_labelings + 1, seed=0)
    labels[labels == 5] = -1
    labels[7] = 5  # a singleton
    fractions = pair_shares(np.stack(labelings))
    expected = np.zeros(40)
    for i in range(40):
        others = [j for j in range(40) if j != i and labels[j] == labels[i] != -1]
        if others:
            expected[i] = sum(fractions[i, j] for j in others) / len(others)
    found = cluster_agreement(labelings, labels)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert len(set(found.tolist())) > 3


def test_hand_worked_majority() -> None:
    labelings = [
        [0, 0, 1, 1, -1],
        [0, 0, 0, 1, 1],
        [0, 0, 0, 0, 0],
    ]
    # 0-1 always; 0-2, 1-2 and 2-3 in two of three (the first and last for 2-3); 3-4 too.
    assert agreement_labels(labelings, 0.5).tolist() == [0] * 5
    assert agreement_labels(labelings, 0.7).tolist() == [0, 0, -1, -1, -1]
    np.testing.assert_allclose(co_association(labelings, 0, [1, 2, 4]), [1, 2 / 3, 1 / 3])


def persons(num: int, images: int, noise: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    pids = torch.arange(num).repeat_interleave(images)
    centers = torch.randn(num, 16, generator=generator)
    return centers[pids] + noise * torch.randn(len(pids), 16, generator=generator)


def test_one_eps_three_times_is_dbscan(device: str) -> None:
    features = persons(30, 12, noise=0.9).to(device)
    single = DBSCANLabeler(eps=0.5, k1=15)(features)
    found = EnsembleLabeler(eps=0.5, delta=0.0, k1=15)(features)
    assert torch.equal(found.labels, single.labels)
    assert found.measured["agreement"] == 1
    assert found.num_clusters > 10
    assert found.num_outliers > 0


def test_auto_eps_equals_that_of_dbscan() -> None:
    features = persons(30, 12, noise=0.9)
    single = DBSCANLabeler(eps="auto", k1=15)(features)
    found = EnsembleLabeler(eps="auto", delta=0.04, k1=15)(features)
    assert found.measured["eps"] == single.measured["eps"]
    assert found.labelings is not None
    middle = PseudoLabels.numbered(found.labelings[1])
    assert torch.equal(middle.labels, single.labels)
    with pytest.raises(ValueError, match=r"got eps auto and delta 0\.2: reduce delta"):
        EnsembleLabeler(eps="auto", delta=0.2)


def test_clusterings_are_those_of_three_eps() -> None:
    features = persons(30, 12, noise=0.9)
    labeler = EnsembleLabeler(eps=0.5, delta=0.15, k1=15)
    found = labeler(features)
    assert found.labelings is not None
    labelings = found.labelings.numpy()
    for labels, eps in zip(labelings, (0.35, 0.5, 0.65), strict=True):
        single = DBSCANLabeler(eps=eps, k1=15)(features)
        assert torch.equal(PseudoLabels.numbered(labels).labels, single.labels)
    expected = agreement_labels(labelings, 0.5)
    assert torch.equal(found.labels, PseudoLabels.numbered(expected).labels)
    fractions = cluster_agreement(labelings, expected)[expected >= 0]
    assert found.measured["agreement"] == pytest.approx(fractions.mean())
    assert 0.5 < found.measured["agreement"] < 1


def test_stricter_agreement_splits_clusters() -> None:
    features = persons(30, 12, noise=0.9)
    loose, strict = (
        EnsembleLabeler(eps=0.5, delta=0.2, k1=15, agreement=limit)(features).labels
        for limit in (0.0, 0.9)
    )
    inside = strict >= 0
    owner = [set(loose[strict == cluster].tolist()) for cluster in strict[inside].unique()]
    assert all(len(clusters) == 1 and -1 not in clusters for clusters in owner)
    assert inside.sum() < (loose >= 0).sum()


@pytest.mark.parametrize("num_images", [0, 1, 2, 3])
def test_few_images_are_outliers(num_images: int) -> None:
    features = F.normalize(torch.randn(num_images, 8), dim=1)
    found = EnsembleLabeler()(features)
    assert found.labels.tolist() == [-1] * num_images
    assert found.measured["agreement"] == 0


def test_identical_images_are_one_cluster() -> None:
    assert EnsembleLabeler()(torch.ones(25, 8)).labels.tolist() == [0] * 25


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: EnsembleLabeler(eps=0.6, delta=0.6),
            r"eps 0.6 and delta 0.6.*reduce delta",
        ),
        (lambda: EnsembleLabeler(eps=0.99, delta=0.02), r"eps 0.99 and delta 0.02"),
        (lambda: EnsembleLabeler(agreement=1.0), r"agreement must be below 1"),
        (lambda: agreement_labels([[0, 0]], 1.0), r"agreement must be >= 0 and < 1, got 1"),
        (lambda: co_association([0, 0], 0, 1), r"labelings.*\(T, M\), got shape \(2,\)"),
    ],
)
def test_wrong_arguments_are_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
