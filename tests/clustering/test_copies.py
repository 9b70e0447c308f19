"""Copies of one image are in one cluster, by every labeler and in any number."""

import importlib.util

import numpy as np
import pytest
import torch

from selcon_plugin.clustering import build_labeler, jaccard_distance, labeler_options
from selcon_plugin.clustering.copies import (
    TOLERANCE,
    copy_groups,
    distances_with_copies,
    unite_copies,
)

LABELERS = ["DBSCAN", "HDBSCAN", "Agglomerative", "KMeans", "Ensemble"]
if importlib.util.find_spec("infomap"):
    LABELERS.append("Infomap")


def unit(array):
    array = torch.as_tensor(array, dtype=torch.float32)
    return array / array.norm(dim=1, keepdim=True)


def persons(num_persons, images_each, seed=0, dim=32):
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(num_persons, 1, dim))
    images = centers + 0.25 * rng.normal(size=(num_persons, images_each, dim))
    return unit(images.reshape(-1, dim))


def rounded(features, seed=0):
    """The same features as computed in batches of other sizes."""
    noise = np.random.default_rng(seed).normal(size=features.shape) * 2e-8
    return features + torch.as_tensor(noise, dtype=torch.float32)


def labeler_for(name):
    sizes = {"k1": 10, "k2": 2, "min_samples": 3}
    known = labeler_options(name)
    options = {key: value for key, value in sizes.items() if key in known}
    if name == "HDBSCAN":
        options["min_cluster_size"] = sizes["min_samples"]
    if name == "KMeans":
        options["num_clusters"] = 10
    return build_labeler(name, **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [2, 8, 40, 100])
@pytest.mark.parametrize("name", LABELERS)
@pytest.mark.parametrize("exact", [True, False])
def test_copies_among_others_are_in_one_cluster(name, count, exact):
    others = persons(8, 5)
    one = unit(np.random.default_rng(9).normal(size=(1, 32))).repeat(count, 1)
    features = torch.cat([others[:20], one if exact else rounded(one), others[20:]])
    found = labeler_for(name)(features)
    copies = found.labels[20 : 20 + count]
    assert len(set(copies.tolist())) == 1
    smallest = labeler_for(name).smallest_cluster(found)
    assert copies[0] >= 0 or count < smallest
    without_copies = labeler_for(name)(others).labels
    rest = torch.cat([found.labels[:20], found.labels[20 + count :]])
    if name not in ("KMeans", "Infomap"):  # the others are clustered about as without them
        together = rest[:, None] == rest
        before = without_copies[:, None] == without_copies
        assert (together == before).float().mean() > 0.9


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [5, 8, 40, 100])
@pytest.mark.parametrize("name", LABELERS)
def test_a_folder_of_copies_is_one_cluster(name, count):
    one = unit(np.random.default_rng(9).normal(size=(1, 32))).repeat(count, 1)
    for features in (one, rounded(one)):
        assert labeler_for(name)(features).labels.tolist() == [0] * count


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LABELERS)
def test_several_images_with_many_copies_each_stay_apart(name):
    features = torch.eye(4, 32).repeat_interleave(30, 0)
    labels = labeler_for(name)(features).labels.view(4, 30)
    assert (labels == labels[:, :1]).all()
    assert len(set(labels[:, 0].tolist())) == 4


def test_groups_are_those_of_a_plain_definition():
    features = persons(20, 6)
    order = torch.randperm(240, generator=torch.Generator().manual_seed(1)) % 120
    features = rounded(features[order])
    distance = torch.cdist(features.double(), features.double())
    expected = (distance <= TOLERANCE).int().argmax(dim=1).numpy()
    assert np.array_equal(copy_groups(features), expected)
    assert np.array_equal(copy_groups(features[:0]), np.zeros(0))
    assert np.array_equal(copy_groups(features[:1]), [0])


def test_zero_rows_and_different_images_are_no_copies():
    features = torch.cat([persons(5, 4), torch.zeros(6, 32)])
    assert np.array_equal(copy_groups(features), np.arange(26))
    near = persons(1, 1).repeat(50, 1) + 1e-3 * torch.eye(50, 32)
    assert len(set(copy_groups(unit(near[:32])).tolist())) == 32


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_distances_of_few_copies_are_those_of_the_definition(copies):
    features = persons(10, 6)
    features = torch.cat([features, features[:1].repeat(copies - 1, 1)])
    expected = jaccard_distance(features, k1=8, k2=2)
    found = distances_with_copies(features, k1=8, k2=2)
    for name in ("data", "indices", "indptr"):
        assert np.array_equal(getattr(found, name), getattr(expected, name))


def test_further_copies_have_the_distances_of_the_first_one():
    others = torch.cat([persons(6, 5), persons(6, 5)[3:4].repeat(4, 1)])
    features = torch.cat([others, others[3:4].repeat(16, 1)])
    number = np.r_[np.arange(34), np.full(16, 3)]
    few = jaccard_distance(others, k1=8, k2=2, max_distance=0.9).toarray()
    found = distances_with_copies(features, k1=8, k2=2, max_distance=0.9)
    assert found.dtype == np.float32
    assert found.has_sorted_indices
    assert np.array_equal(found.toarray(), few[np.ix_(number, number)])
    assert (found.toarray()[30:, 30:] <= 1e-6).all()


def test_labels_are_united_by_the_most_frequent_cluster():
    groups = np.array([0, 0, 0, 0, 4, 5, 5, 7])
    labels = np.array([1, 1, 0, -1, 0, -1, -1, -1])
    assert unite_copies(labels, groups).tolist() == [1, 1, 1, 1, 0, 2, 2, -1]
    assert unite_copies(labels, groups, 3).tolist() == [1, 1, 1, 1, 0, -1, -1, -1]
    assert unite_copies(labels, np.arange(8)).tolist() == labels.tolist()
