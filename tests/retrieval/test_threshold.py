"""Thresholds on synthetic persons: the suggestion is near the known optimum."""

import numpy as np
import pytest

from selcon_plugin.retrieval import suggest_threshold


def draw(rng, sizes, *, dim, noise, lonely=0):
    """Unit features of people with so many images, and of people seen once."""
    people = np.repeat(np.arange(len(sizes)), sizes)
    features = rng.normal(size=(len(sizes), dim))[people]
    features = features + noise * rng.normal(size=features.shape)
    features = np.concatenate([features, rng.normal(size=(lonely, dim))])
    people = np.concatenate([people, len(sizes) + np.arange(lonely)])
    return features / np.linalg.norm(features, axis=1, keepdims=True), people


def sorted_cosines(features):
    cosines = features @ features.T
    np.fill_diagonal(cosines, -2.0)
    return np.sort(cosines, axis=1)[:, :0:-1]


def f1(features, people, threshold):
    """F1 of "same person" over all pairs of two images."""
    above = np.triu(features @ features.T >= threshold, k=1)
    same = np.triu(people[:, None] == people, k=1)
    return 2 * (above & same).sum() / (above.sum() + same.sum())


@pytest.mark.parametrize(
    ("sizes", "dim", "noise", "lonely"),
    [
        ([10] * 60, 64, 0.6, 0),
        ([10] * 60, 64, 1.0, 0),  # the groups overlap
        ([2, 3, 4, 5, 6] * 30, 128, 0.7, 0),
        ([100] * 8, 64, 0.8, 0),  # more images of a person than the first lists are long
        ([4] * 60, 128, 0.8, 200),  # most people seen once
        ([2] * 250, 256, 0.8, 0),
    ],
)
def test_comes_near_the_best_threshold_that_labels_can_find(sizes, dim, noise, lonely):
    features, people = draw(
        np.random.default_rng(0), sizes, dim=dim, noise=noise, lonely=lonely
    )
    found = suggest_threshold(sorted_cosines(features))
    best = max(f1(features, people, t) for t in np.linspace(-0.2, 0.95, 70))
    assert found.is_clear
    assert f1(features, people, found.threshold) > best - 0.03


def test_is_unclear_where_nobody_is_seen_twice_or_everybody_is_one_person():
    rng = np.random.default_rng(1)
    for sizes, noise in (([1] * 400, 0.0), ([400], 0.5)):
        features, _ = draw(rng, sizes, dim=64, noise=noise)
        found = suggest_threshold(sorted_cosines(features))
        assert not found.is_clear
        assert "unclear" in str(found)


def test_lies_between_groups_too_far_apart_for_densities_to_be_numbers():
    rows = np.array([[0.9, 0.9, 0.1, 0.1]] * 10)
    found = suggest_threshold(rows)
    assert found.threshold == pytest.approx(0.5, abs=0.01)  # equal spread and share
    assert found.num_neighbors == 4


def test_equal_cosines_are_no_two_groups():
    found = suggest_threshold(np.full((5, 3), 0.7))
    assert not found.is_clear
    assert found.threshold == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (5,)])
def test_refuses_too_few(shape):
    with pytest.raises(ValueError, match=r"at least 2 images with at least 2 neighbors"):
        suggest_threshold(np.zeros(shape))


def test_refuses_numbers_that_are_none():
    with pytest.raises(ValueError, match="not finite"):
        suggest_threshold([[0.5, np.nan], [0.5, 0.1]])


@pytest.mark.parametrize("count", [3, 5, 8, 10, 12, 20, 40])
@pytest.mark.parametrize("dim", [8, 128])
def test_is_unclear_if_every_image_shows_another_person(count, dim):
    for seed in range(4):
        rng = np.random.default_rng(seed)
        features = rng.normal(size=(count, dim)) + rng.choice([0.0, 0.6, 1.5])
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        found = suggest_threshold(sorted_cosines(features))
        assert not found.is_clear
        assert "unclear" in str(found)
        assert ", clear" not in str(found)


@pytest.mark.parametrize("count", [3, 8, 12, 40])
@pytest.mark.parametrize("noise", [0.1, 0.6])
def test_is_unclear_among_images_of_one_person(count, noise):
    for seed in range(4):
        features, _ = draw(np.random.default_rng(seed), [count], dim=64, noise=noise)
        assert not suggest_threshold(sorted_cosines(features)).is_clear


@pytest.mark.parametrize(
    ("people", "images"), [(2, 4), (3, 4), (6, 4), (10, 2), (20, 3), (40, 2), (8, 40)]
)
@pytest.mark.parametrize("noise", [0.3, 0.6])
def test_is_clear_where_people_are_seen_several_times(people, images, noise):
    for seed in range(2):
        features, persons = draw(
            np.random.default_rng(seed), [images] * people, dim=128, noise=noise
        )
        found = suggest_threshold(sorted_cosines(features))
        assert found.is_clear
        assert f1(features, persons, found.threshold) > 0.97


def test_few_images_are_named():
    found = suggest_threshold([[0.9, 0.1], [0.9, 0.2], [0.1, 0.2]])
    assert not found.is_clear
    assert "3 images are too few" in str(found)
