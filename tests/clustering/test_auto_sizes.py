"""Sizes that a labeler leaves open."""

from __future__ import annotations

import pytest
import torch

from helpers.features import people_with
from selcon_plugin.clustering import DBSCANLabeler, HDBSCANLabeler, PseudoLabels
from selcon_plugin.clustering.auto_sizes import MEASURED, AutoSizes
from selcon_plugin.clustering.auto_threshold import estimate_images_per_person
from selcon_plugin.clustering.neighborhood import NeighborhoodSizes

OPEN = {"k1": "auto", "k2": "auto", "min_samples": "auto"}


def test_hint_takes_the_place_of_the_estimate() -> None:
    features = people_with(4, 30)
    sizes, measured = AutoSizes(9, OPEN).choose(features)
    assert (sizes, measured) == (NeighborhoodSizes.for_people(9), {MEASURED: 9})
    sizes, measured = AutoSizes("auto", OPEN).choose(features)
    assert measured[MEASURED] == estimate_images_per_person(features)
    assert sizes == NeighborhoodSizes.for_people(measured[MEASURED])


def test_given_sizes_stay() -> None:
    features = people_with(4, 30)
    fixed = {"k1": 12, "k2": 3, "min_samples": 5}
    assert AutoSizes("auto", fixed).choose(features) == (NeighborhoodSizes(12, 3, 5), {})
    sizes, _ = AutoSizes(4, {**fixed, "k1": "auto"}).choose(features)
    assert sizes == NeighborhoodSizes(7, 3, 5)


@pytest.mark.parametrize("labeler", [DBSCANLabeler, HDBSCANLabeler])
def test_labelers_use_the_sizes_of_the_hint(labeler) -> None:
    features = people_with(4, 60)
    sizes = NeighborhoodSizes.for_people(4)
    fixed = vars(sizes) | (
        {"min_cluster_size": sizes.min_samples} if labeler is HDBSCANLabeler else {}
    )
    auto = {name: "auto" for name in fixed}
    found = labeler(images_per_person=4, **auto)(features)
    assert torch.equal(found.labels, labeler(**fixed)(features).labels)
    assert found.measured[MEASURED] == 4


@pytest.mark.parametrize("labeler", [DBSCANLabeler, HDBSCANLabeler])
def test_hint_without_effect_is_refused(labeler) -> None:
    with pytest.raises(ValueError, match=r"images_per_person 3 .*k1, k2, min_samples"):
        labeler(images_per_person=3)


def test_other_eps_keeps_the_sizes_of_the_clustering() -> None:
    labeler = DBSCANLabeler(eps=0.5, **OPEN)
    found = labeler.cluster(people_with(3, 40))
    assert isinstance(found, PseudoLabels)
    assert torch.equal(labeler.labels_at(found, 0.0), found.labels)
