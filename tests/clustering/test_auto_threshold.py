"""Threshold and images per person without labels, against definitions and on clear data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import silhouette_score

from helpers.features import people_with
from selcon_plugin.clustering.auto_threshold import (
    THRESHOLDS,
    check_hint,
    choose_cut,
    estimate_images_per_person,
    images_for,
    mean_silhouette,
    threshold_for,
    try_cuts,
)
from selcon_plugin.clustering.linkage import average_linkage
from selcon_plugin.clustering.multi_scale import multi_scale_distance, without_mean


def test_silhouette_is_that_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(200, 16, generator=generator), dim=1)
    labels = np.random.default_rng(0).integers(0, 30, 200)
    labels = np.unique(labels, return_inverse=True)[1]
    labels[0] = labels.max() + 1  # a cluster of one image
    expected = silhouette_score(features.numpy(), labels, metric="cosine")
    assert mean_silhouette(features, labels) == pytest.approx(expected, abs=1e-5)


def test_silhouette_of_many_images_is_that_of_a_sample() -> None:
    features = people_with(4, 1500)
    labels = np.arange(1500).repeat(4)
    full = silhouette_score(features.numpy(), labels, metric="cosine")
    assert mean_silhouette(features, labels) == pytest.approx(full, abs=0.01)


def test_silhouette_of_one_cluster_is_zero() -> None:
    features = people_with(4, 2)
    assert mean_silhouette(features, np.zeros(8, dtype=np.int64)) == 0
    assert mean_silhouette(features[:0], np.zeros(0, dtype=np.int64)) == 0
    assert mean_silhouette(features, np.arange(8)) == 0  # single images


def test_threshold_and_images_per_person_are_inverse() -> None:
    for number in (2, 3, 4, 8, 17, 25):
        assert images_for(threshold_for(number)) == pytest.approx(number)
    assert threshold_for(1) == THRESHOLDS[0]
    assert threshold_for(1000) == THRESHOLDS[-1]


def test_score_is_the_silhouette_less_the_distance_from_the_middle() -> None:
    features = people_with(5, 20)
    hierarchy = average_linkage(multi_scale_distance(features))
    cuts = try_cuts(hierarchy, features)
    assert [cut.threshold for cut in cuts] == list(THRESHOLDS)
    for cut in cuts[::7]:
        labels = hierarchy.cut(cut.threshold)
        sizes = np.bincount(labels)[labels]
        assert cut.size == pytest.approx(sizes.mean())
        silhouette = mean_silhouette(without_mean(features), labels)
        usual = 1 - 1 / (8 * (100 / 1000) ** 0.4)
        expected = silhouette - 1.5 * (cut.threshold - usual) ** 2
        if sizes.mean() > 90:
            expected = -1
        assert cut.score == pytest.approx(expected)
    assert choose_cut(hierarchy, features) == max(cuts, key=lambda cut: cut.score)


def test_with_cameras_matches_across_them_count_as_well() -> None:
    features = people_with(6, 20, noise=1.5)
    camids = torch.arange(120) % 3
    hierarchy = average_linkage(multi_scale_distance(features))
    plain = try_cuts(hierarchy, features)
    for camids_of_none in (torch.full((120,), -1), torch.zeros(120, dtype=torch.long)):
        assert try_cuts(hierarchy, features, camids_of_none) == plain
    compared = without_mean(features)
    for cut, without in zip(try_cuts(hierarchy, features, camids), plain, strict=True):
        labels = hierarchy.cut(cut.threshold)
        across = mean_silhouette(compared, labels, camids)
        if without.score > -1:
            assert cut.score == pytest.approx(without.score + across)


def test_silhouette_across_cameras_is_its_definition() -> None:
    features = people_with(4, 15, noise=1.5)
    generator = np.random.default_rng(0)
    labels = np.unique(generator.integers(0, 20, 60), return_inverse=True)[1]
    camids = generator.integers(-1, 3, 60)
    distance = 1 - (features @ features.T).numpy()
    scores = []
    for image in range(60):
        means = {}
        for label in range(labels.max() + 1):
            others = np.flatnonzero((labels == label) & (camids != camids[image]))
            if len(others):
                means[label] = distance[image, others].mean()
        a = means.pop(labels[image], None)
        b = min(means.values(), default=None)
        scores.append(0 if a is None or b is None else (b - a) / max(a, b))
    found = mean_silhouette(features, labels, torch.from_numpy(camids))
    assert found == pytest.approx(np.mean(scores), abs=1e-5)


@pytest.mark.parametrize("images", [3, 6, 15])
def test_images_per_person_are_right_within_a_factor(images: int) -> None:
    found = estimate_images_per_person(people_with(images, 40))
    assert images / 2.5 < found < images * 2.5


def test_hint_needs_something_to_determine() -> None:
    check_hint("auto", {"k1": 30})
    check_hint(4, {"k1": "auto", "k2": 6})
    with pytest.raises(ValueError, match=r"images_per_person 4 .*k1, k2"):
        check_hint(4, {"k1": 30, "k2": 6})
