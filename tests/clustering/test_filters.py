from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from selcon_plugin.clustering import (
    Labeler,
    OutlierPolicy,
    PseudoLabels,
    ReliabilityFilter,
    SingleCameraFilter,
    build_labeler,
)
from selcon_plugin.clustering import filters as module


class Fixed(Labeler):
    """Labeler with fixed labels at eps, and at a smaller and a larger eps."""

    def __init__(self, *labelings: Any) -> None:
        self.tight, self.at_eps, self.loose = (torch.as_tensor(x) for x in labelings)

    def cluster(self, features: Tensor) -> PseudoLabels:
        return PseudoLabels.numbered(self.at_eps, distance="graph", measured={"eps": 0.5})

    def labels_at(self, pseudo_labels: PseudoLabels, eps_change: float) -> Tensor:
        assert pseudo_labels.distance == "graph"
        assert abs(eps_change) == 0.02
        return self.tight if eps_change < 0 else self.loose


def apply(
    label_filter: Any,
    labels: Any,
    features: Tensor | None = None,
    camids: Tensor | None = None,
    labeler: Any = None,
) -> PseudoLabels:
    given = PseudoLabels.numbered(
        labels,
        distance="graph",
        measured={"eps": 0.5},
        labelings=torch.as_tensor(labels)[None],
    )
    if features is None:
        features = torch.eye(max(1, given.num_images))[: given.num_images]
    before = given.labels.clone()
    found = label_filter(given, features, camids, labeler)
    assert torch.equal(given.labels, before)
    assert found.distance == "graph"
    assert found.measured["eps"] == 0.5
    assert found.labelings is given.labelings
    return found


def members(labels: NDArray[np.int64], image: int) -> set[int]:
    """Return the images in the cluster of an image; an outlier is a singleton."""
    if labels[image] < 0:
        return {image}
    return set(np.flatnonzero(labels == labels[image]).tolist())


def reliable_by_loops(
    tight: NDArray[np.int64],
    labels: NDArray[np.int64],
    loose: NDArray[np.int64],
    threshold: float | None,
    quantile: float,
) -> tuple[list[int], float | None]:
    def distance(other: NDArray[np.int64], image: int) -> float:
        own, others = members(labels, image), members(other, image)
        return 1 - len(own & others) / len(own | others)

    inside = [i for i in range(len(labels)) if labels[i] >= 0]
    independence: dict[int, float] = {}
    compactness: dict[int, float] = {}
    for i in inside:
        c = int(labels[i])
        independence[c] = min(independence.get(c, 1.0), distance(loose, i))
        compactness[c] = min(compactness.get(c, 1.0), distance(tight, i))
    if threshold is None and independence:
        ordered = sorted(independence.values())
        threshold = ordered[min(max(1, round(len(ordered) * quantile)), len(ordered)) - 1]
    kept = {}
    for i in inside:
        c = int(labels[i])
        if independence[c] <= threshold and distance(tight, i) <= compactness[c]:
            kept.setdefault(c, []).append(i)
    result = [-1] * len(labels)
    for c, images in kept.items():
        if len(images) > 1:
            for i in images:
                result[i] = c
    return result, threshold


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_reliability_equals_loops_over_three_epochs(quantile: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    label_filter = ReliabilityFilter(quantile=quantile)
    threshold = None
    kept = 0
    for _ in range(3):
        labels = PseudoLabels.numbered(rng.integers(-1, 12, 60)).labels.numpy()
        tight = np.where(rng.random(60) < 0.1, -1, 2 * labels + rng.integers(0, 2, 60))
        tight = np.maximum(tight, -1)  # clusters split in two and lose images
        loose = np.where(labels >= 0, labels // rng.integers(1, 3), rng.integers(-1, 9, 60))
        labeler = Fixed(tight, labels, loose)
        expected, threshold = reliable_by_loops(tight, labels, loose, threshold, quantile)
        found = apply(label_filter, labels, labeler=labeler)
        assert found.labels.tolist() == PseudoLabels.numbered(expected).labels.tolist()
        assert label_filter.threshold == threshold
        kept += found.num_clusters
    assert kept > 0


def test_reliability_by_hand() -> None:
    labels = [0, 0, 0, 0, 1, 1, 2, 2, 2]
    # Cluster 0 loses image 3 when eps decreases; clusters 1 and 2 merge when it increases.
    labeler = Fixed([0, 0, 0, -1, 1, 1, 2, 2, 2], labels, [0, 0, 0, 0, 1, 1, 1, 1, 1])
    # R_indep: cluster 0: 0, cluster 1: 1 - 2/5, cluster 2: 1 - 3/5.
    label_filter = ReliabilityFilter(quantile=0.67)
    found = apply(label_filter, labels, labeler=labeler)
    assert label_filter.threshold == pytest.approx(2 / 5)
    assert found.labels.tolist() == [0, 0, 0, -1, -1, -1, 1, 1, 1]


def test_a_remaining_singleton_becomes_an_outlier() -> None:
    labels = [0, 0, 0, 1, 1]
    # Cluster 0 falls apart into images 0-1 and image 2: IoU 2/3, 2/3 and 1/3; cluster 1
    # stays whole. With unchanged loose clusters, only image 2 is dropped ...
    labeler = Fixed([0, 0, 1, 2, 2], labels, labels)
    assert apply(ReliabilityFilter(), labels, labeler=labeler).num_outliers == 1
    # ... and if the tight clustering groups image 0 only with another person, all are.
    labeler = Fixed([0, 1, 1, 2, 2], [0, 0, -1, 1, 1], [0, 0, -1, 1, 1])
    found = apply(ReliabilityFilter(), [0, 0, -1, 1, 1], labeler=labeler)
    assert found.labels.tolist() == [-1, -1, -1, 0, 0]


def test_the_threshold_waits_for_clusters_and_then_stays() -> None:
    label_filter = ReliabilityFilter()
    nothing = [-1, -1, -1, -1]
    outliers = apply(label_filter, nothing, labeler=Fixed(nothing, nothing, nothing))
    assert outliers.labels.tolist() == nothing
    assert label_filter.state_dict() == {"threshold": None}
    pairs, one = [0, 0, 1, 1], [0, 0, 0, 0]
    assert apply(label_filter, pairs, labeler=Fixed(pairs, pairs, pairs)).num_clusters == 2
    assert label_filter.state_dict() == {"threshold": 0.0}
    resumed = ReliabilityFilter()
    resumed.load_state_dict(label_filter.state_dict())
    merging = Fixed(pairs, pairs, one)
    assert apply(resumed, pairs, labeler=merging).num_clusters == 0
    assert apply(ReliabilityFilter(), pairs, labeler=merging).num_clusters == 2
    resumed.load_state_dict({})
    assert resumed.threshold is None


@pytest.fixture(scope="module")
def features() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(15, 32, generator=generator).repeat_interleave(10, dim=0)
    return centers + 1.3 * torch.randn(150, 32, generator=generator)


def test_reliability_with_dbscan(features: Tensor) -> None:
    labeler = build_labeler("DBSCAN", eps=0.55, filters=[ReliabilityFilter(delta=0.05)])
    tight, plain, loose = (
        build_labeler("DBSCAN", eps=eps)(features).labels.numpy()
        for eps in (0.5, 0.55, 0.6)
    )
    expected, threshold = reliable_by_loops(tight, plain, loose, None, 0.9)
    found = labeler(features)
    assert found.labels.tolist() == PseudoLabels.numbered(expected).labels.tolist()
    assert found.num_clusters > 0
    assert found.num_outliers > (plain < 0).sum()
    assert labeler.state_dict() == {"0": {"threshold": threshold}}


def test_reliability_needs_a_labeler_with_eps(features: Tensor) -> None:
    labeler = build_labeler("KMeans", num_clusters=5, filters=[ReliabilityFilter()])
    with pytest.raises(ValueError, match="KMeansLabeler has no eps"):
        labeler(features)


def test_clusters_of_one_camera_become_outliers() -> None:
    labels = [0, 0, 1, 1, 2, 2, -1, 3, 3]
    camids = torch.tensor([0, 0, 0, 1, 5, 5, 5, 5, -1])
    found = apply(SingleCameraFilter(), labels, camids=camids)
    # Cluster 3 has an unknown camera, which may be a second one.
    assert found.labels.tolist() == [-1, -1, 0, 0, -1, -1, -1, 1, 1]


@pytest.mark.parametrize(
    "camids", [None, torch.tensor([-1, -1, -1]), torch.tensor([3, 3, -1])]
)
def test_unknown_cameras_change_nothing_and_warn_once(
    camids: Tensor | None, caplog: pytest.LogCaptureFixture
) -> None:
    label_filter = SingleCameraFilter()
    for _ in range(2):
        found = apply(label_filter, [0, 0, 1], camids=camids)
        assert found.labels.tolist() == [0, 0, 1]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "fewer than two cameras are known" in record.getMessage()


def test_all_outliers_and_known_cameras() -> None:
    found = apply(SingleCameraFilter(), [-1, -1], camids=torch.tensor([0, 1]))
    assert found.labels.tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("drop", [0, -1, 1, 0, -1, 1]),
        ("singleton", [0, 2, 1, 0, 3, 1]),
        ("nearest", [0, 1, 1, 0, 0, 1]),
    ],
)
def test_outlier_policies_by_hand(policy: Any, expected: list[int], device: str) -> None:
    angles = torch.tensor([0.0, 1.2, 1.5, 0.2, 0.5, 1.6])
    features = torch.stack([angles.cos(), angles.sin()], dim=1).to(device)
    found = apply(OutlierPolicy(policy), [0, -1, 1, 0, -1, 1], features)
    assert found.labels.tolist() == expected
    assert found.measured["found_outlier_ratio"] == pytest.approx(2 / 6)


def test_nearest_equals_a_loop_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(40, 8, generator=generator), dim=1)
    labels = PseudoLabels.numbered(rng.integers(-3, 5, 40)).labels
    means = [features[labels == c].mean(0) for c in range(5)]
    expected = [
        int(label)
        if label >= 0
        else max(range(5), key=lambda c, f=f: float(f @ means[c] / means[c].norm()))
        for label, f in zip(labels, features, strict=True)
    ]
    monkeypatch.setattr(module, "_CHUNK_ENTRIES", 20)  # four outliers at a time
    assert apply(OutlierPolicy("nearest"), labels, features).labels.tolist() == expected


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("drop", [-1, -1]), ("singleton", [0, 1]), ("nearest", [-1, -1])],
)
def test_outlier_policies_without_clusters(policy: Any, expected: list[int]) -> None:
    assert apply(OutlierPolicy(policy), [-1, -1]).labels.tolist() == expected


@pytest.mark.parametrize("policy", ["drop", "singleton", "nearest"])
def test_outlier_policies_without_outliers_or_images(policy: Any) -> None:
    assert apply(OutlierPolicy(policy), [0, 0, 1]).labels.tolist() == [0, 0, 1]
    assert apply(OutlierPolicy(policy), []).labels.tolist() == []


def test_filters_compose(features: Tensor) -> None:
    camids = torch.arange(150) % 3
    camids[:10] = 1  # the first identity is seen by one camera
    filters = [ReliabilityFilter(), SingleCameraFilter(), OutlierPolicy("singleton")]
    found = build_labeler("DBSCAN", eps=0.55, filters=filters)(features, camids)
    before = build_labeler("DBSCAN", eps=0.55, filters=filters[:2])(features, camids)
    assert before.num_outliers > 0
    assert found.num_outliers == 0
    assert found.num_clusters == before.num_clusters + before.num_outliers
    assert found.measured["found_outlier_ratio"] == before.outlier_ratio
    kept = before.labels >= 0
    assert torch.equal(found.labels[kept], before.labels[kept])
    for c in range(before.num_clusters):
        assert len(camids[before.labels == c].unique()) > 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ReliabilityFilter(delta=0), r"delta must lie in \(0, 1\), got 0"),
        (lambda: ReliabilityFilter(quantile=1.5), r"quantile .*\(0, 1\], got 1.5"),
        (lambda: OutlierPolicy("keep"), "'drop', 'singleton' or 'nearest', got 'keep'"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
