"""Neighborhood sizes by the number of images per person."""

import itertools

import pytest

from selcon_plugin.clustering import DBSCANLabeler, HDBSCANLabeler, build_labeler
from selcon_plugin.clustering.neighborhood import NeighborhoodSizes


@pytest.mark.parametrize(
    ("images_per_person", "sizes"),
    [(1, (4, 1, 2)), (2, (4, 1, 2)), (4, (7, 2, 2)), (8, (14, 4, 3)), (17, (30, 6, 4))],
)
def test_few_images_per_person_have_fewer_neighbors(images_per_person, sizes) -> None:
    expected = NeighborhoodSizes(*sizes)
    assert NeighborhoodSizes.for_people(images_per_person) == expected


def test_many_images_per_person_have_the_published_sizes() -> None:
    assert NeighborhoodSizes.for_people(17) == NeighborhoodSizes()
    assert NeighborhoodSizes.for_people(1000) == NeighborhoodSizes()


def test_sizes_never_fall_with_more_images() -> None:
    found = [NeighborhoodSizes.for_people(number / 2) for number in range(2, 60)]
    for smaller, larger in itertools.pairwise(found):
        assert all(size <= vars(larger)[name] for name, size in vars(smaller).items())


def test_estimates_know_the_number_of_neighbors():
    assert DBSCANLabeler(k1="auto").num_neighbors(100) == 30
    assert DBSCANLabeler(k1=20).num_neighbors(100) == 20
    assert HDBSCANLabeler(k1=25).num_neighbors(100) == 25
    assert build_labeler("Agglomerative", k1="auto").num_neighbors(100) == 20
    assert build_labeler("KMeans").num_neighbors(100) == 0
