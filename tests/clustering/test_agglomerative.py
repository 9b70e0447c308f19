"""Agglomerative labeler: small clusters, copies, separate persons, and what is "auto"."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers.features import people_with
from selcon_plugin.clustering import AgglomerativeLabeler, PseudoLabels, build_labeler
from selcon_plugin.metrics.identities import adjusted_mutual_info


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


AUTO = {"threshold": "auto", "k1": "auto", "min_cluster_size": "auto"}


@pytest.mark.parametrize("images", [2, 4, 8, 17, 40])
def test_separate_persons_are_found_for_any_number_of_images(images: int) -> None:
    features = people_with(images, 30, noise=0.6)
    found = AgglomerativeLabeler(**AUTO)(features)
    people = torch.arange(30).repeat_interleave(images)
    assert adjusted_mutual_info(found.labels.numpy(), people.numpy()) > 0.96


def test_hint_determines_the_threshold() -> None:
    features = people_with(4, 40)
    found = AgglomerativeLabeler(images_per_person=4, **AUTO)(features)
    assert found.measured["threshold"] == 0.75
    assert found.measured["images_per_person"] == 4
    fixed = AgglomerativeLabeler(**{**AUTO, "threshold": 0.75})(features)
    assert torch.equal(found.labels, fixed.labels)
    assert "images_per_person" not in fixed.measured


def test_hint_without_effect_is_refused() -> None:
    with pytest.raises(ValueError, match=r"images_per_person 4 .*threshold"):
        AgglomerativeLabeler(images_per_person=4)


def test_order_of_images_does_not_matter() -> None:
    features = people_with(5, 30)
    order = torch.from_numpy(np.random.default_rng(0).permutation(150))
    found = AgglomerativeLabeler(**AUTO)(features)
    shuffled = AgglomerativeLabeler(**AUTO)(features[order])
    expected = PseudoLabels.numbered(found.labels[order])
    assert torch.equal(shuffled.labels, expected.labels)
    assert shuffled.measured["threshold"] == found.measured["threshold"]


def test_k2_auto_is_a_fifth_of_k1() -> None:
    features = people_with(6, 20)
    auto = AgglomerativeLabeler(k1=12, k2="auto")(features)
    assert torch.equal(auto.labels, AgglomerativeLabeler(k1=12, k2=2)(features).labels)


@pytest.mark.parametrize("num_images", [0, 1, 2, 3, 5])
def test_few_images_can_be_clustered(num_images: int) -> None:
    features = F.normalize(torch.randn(num_images, 8), dim=1)
    found = build_labeler("Agglomerative", **AUTO)(features)
    assert len(found.labels) == num_images
