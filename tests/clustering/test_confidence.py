"""Confidence and cohesion: their definitions in loops, and what they say of mixtures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import silhouette_score

from helpers.features import people_with
from selcon_plugin.clustering.confidence import cohesion, pair_confidence
from selcon_plugin.clustering.multi_scale import multi_scale_distance, without_mean


def dense_closeness(distance):
    closeness = np.zeros(distance.shape)
    coordinates = distance.tocoo()
    closeness[coordinates.row, coordinates.col] = 1 - coordinates.data
    return closeness


def grouped():
    """Twelve people of five images; two are one cluster, one person is two of them."""
    features = people_with(5, 12, noise=1.2)
    labels = np.arange(12).repeat(5)
    labels[labels == 11] = 10
    labels[:2] = 11
    labels[[7, 30]] = -1
    return features, labels


def test_confidence_is_its_equation() -> None:
    features, labels = grouped()
    distance = multi_scale_distance(features)
    closeness = dense_closeness(distance)
    single = labels.copy()
    single[single < 0] = 50 + np.arange(2)
    silhouette = silhouette_score(without_mean(features).numpy(), single, metric="cosine")
    found = pair_confidence(features, distance, labels)
    for image, label in enumerate(labels):
        mates = [i for i in np.flatnonzero(labels == label) if i != image]
        if label < 0 or not mates:
            assert found[image] == 0
            continue
        score = 6.6 * np.mean(closeness[image, mates]) + 0.75 * math.log(len(mates) + 1)
        score += 9.4 * silhouette - 5.2
        assert found[image] == pytest.approx(1 / (1 + math.exp(-score)), abs=1e-4)


def test_cohesion_is_the_closeness_of_the_last_merge_over_the_mean() -> None:
    features, labels = grouped()
    distance = multi_scale_distance(features)
    closeness = dense_closeness(distance)
    found = cohesion(distance, labels)
    assert found.shape == (12,)
    for label in range(12):
        images = np.flatnonzero(labels == label)
        pairs = closeness[np.ix_(images, images)]
        mean = pairs[~np.eye(len(images), dtype=bool)].mean()
        parts = [[i] for i in range(len(images))]
        while len(parts) > 1:
            between, a, b = max(
                (pairs[np.ix_(parts[a], parts[b])].mean(), a, b)
                for b in range(len(parts))
                for a in range(b)
            )
            parts[a] += parts.pop(b)
        assert found[label] == pytest.approx(min(1, between / mean), abs=1e-4)


def test_clusters_of_two_people_have_low_cohesion() -> None:
    features = people_with(6, 20, noise=0.8)
    labels = np.arange(20).repeat(6)
    labels[labels == 19] = 18
    found = cohesion(multi_scale_distance(features), labels)
    assert found[18] < 0.3 < found[:18].min()


def test_outliers_and_single_images_have_no_confidence() -> None:
    features = people_with(4, 10)
    distance = multi_scale_distance(features)
    assert not pair_confidence(features, distance, np.full(40, -1)).any()
    assert not pair_confidence(features, distance, np.arange(40)).any()
    assert cohesion(distance, np.full(40, -1)).shape == (0,)
    assert not cohesion(distance, np.arange(40)).any()


def test_single_images_in_one_cluster_are_not_confident() -> None:
    clear = people_with(4, 30, noise=0.5)
    labels = np.arange(30).repeat(4)
    others = people_with(1, 3, seed=9)
    features = torch.cat([clear, others])
    together = np.append(labels, [30, 30, 30])
    found = pair_confidence(features, multi_scale_distance(features), together)
    assert found[:120].min() > 0.9
    assert found[120:].max() < found[:120].min()
    # A set in which nobody appears twice, in clusters of three at random.
    single = people_with(1, 90)
    found = pair_confidence(single, multi_scale_distance(single), np.arange(90) % 30)
    assert found.max() < 0.1
