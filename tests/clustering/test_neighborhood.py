"""Neighborhood sizes by the number of images, on their own and in DBSCAN."""

from dataclasses import asdict

import pytest
import torch

from selcon_plugin.clustering import DBSCANLabeler, HDBSCANLabeler, build_labeler
from selcon_plugin.clustering.neighborhood import NeighborhoodSizes


@pytest.mark.parametrize(
    ("num_images", "sizes"),
    [(0, (8, 1, 3)), (100, (10, 2, 3)), (999, (15, 3, 3)), (1000, (30, 6, 4))],
)
def test_few_images_have_fewer_neighbors(num_images: int, sizes: tuple[int, ...]) -> None:
    assert NeighborhoodSizes.for_images(num_images) == NeighborhoodSizes(*sizes)


@pytest.mark.parametrize("num_images", [60, 400, 1100])
def test_auto_is_that_of_the_number_of_images(num_images):
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(num_images // 6 + 1, 16, generator=generator)
    noise = torch.randn(num_images, 16, generator=generator)
    features = centers[torch.arange(num_images) // 6] + 0.5 * noise
    features = torch.nn.functional.normalize(features, dim=1)
    sizes = asdict(NeighborhoodSizes.for_images(num_images))
    auto = dict.fromkeys(sizes, "auto")

    found = DBSCANLabeler(eps="auto", **auto)(features)
    expected = DBSCANLabeler(eps="auto", **sizes)(features)
    assert torch.equal(found.labels, expected.labels)
    assert found.num_clusters > 1
    assert (found.distance != expected.distance).nnz == 0
    for change in (-0.05, 0.05):
        again = DBSCANLabeler(eps="auto", **auto).labels_at(found, change)
        wanted = DBSCANLabeler(eps="auto", **sizes).labels_at(expected, change)
        assert torch.equal(again, wanted)
    # A number for another option is kept.
    mixed = DBSCANLabeler(eps=0.5, min_samples=2, k1="auto", k2="auto")(features)
    by_hand = DBSCANLabeler(eps=0.5, **{**sizes, "min_samples": 2})(features)
    assert torch.equal(mixed.labels, by_hand.labels)


def test_estimates_know_the_number_of_neighbors():
    assert DBSCANLabeler(k1="auto").num_neighbors(100) == 10
    assert DBSCANLabeler(k1="auto").num_neighbors(5000) == 30
    assert DBSCANLabeler(k1=20).num_neighbors(100) == 20
    assert HDBSCANLabeler(k1=25).num_neighbors(100) == 25
    assert build_labeler("KMeans").num_neighbors(100) == 0
