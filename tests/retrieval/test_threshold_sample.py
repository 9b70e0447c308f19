"""Thresholds of searches across cameras: constructed features and invariants."""

import numpy as np
import pytest

from helpers.indexes import filled, unit
from selcon_plugin.retrieval.threshold_counts import num_mates, threshold_of_count
from selcon_plugin.retrieval.threshold_sample import suggest_for_rows


def draw(seed, people, images, *, cameras=3, noise=0.6, camera_effect=1.0, dim=128):
    """Persons, each with so many images per camera, and features moved by cameras."""
    rng = np.random.default_rng(seed)
    person = np.repeat(np.arange(people), images * cameras)
    camera = np.tile(np.repeat(np.arange(cameras), images), people)
    rows = rng.normal(size=(people, dim))[person] + noise * rng.normal(
        size=(len(person), dim)
    )
    rows += camera_effect * rng.normal(size=(cameras, dim))[camera]
    return unit(rows), person, np.array([f"c{c}" for c in camera], dtype=object)


def suggest(features, cameras=None):
    return suggest_for_rows(features, np.arange(len(features)), cameras)


def f1(features, person, cameras, threshold):
    pairs = np.not_equal(cameras[:, None], cameras[None]).astype(bool)
    above = (features @ features.T >= threshold) & pairs
    same = (person[:, None] == person) & pairs
    return 2 * (above & same).sum() / (above.sum() + same.sum())


@pytest.mark.parametrize(("people", "images"), [(20, 1), (20, 8), (150, 2), (60, 5)])
def test_comes_near_the_best_threshold_across_cameras(people, images):
    features, person, cameras = draw(0, people, images)
    best = max(f1(features, person, cameras, t) for t in np.linspace(0.0, 0.6, 25))
    found = suggest(features, cameras)
    assert f1(features, person, cameras, found.threshold) > best - 0.05
    if images > 1:  # nearest neighbors come from the image's own camera
        assert f1(features, person, cameras, suggest(features).threshold) < best - 0.05


def test_overlapping_matches_are_counted_and_unclear():
    rng = np.random.default_rng(1)
    cosines = rng.normal(size=(200, 1000))
    cosines[:, :100] = 2.6 + 1.2 * rng.normal(size=(200, 100))
    cosines = (0.5 + 0.08 * cosines).astype(np.float32)
    mates = num_mates(cosines, 1000)
    assert 60 < mates < 90  # 100 less the 27.5 that similar others make up
    threshold = threshold_of_count(cosines, 1000, mates)
    assert (cosines >= threshold).sum() == round(200 * mates)
    # Shifted or scaled cosines have the shifted or scaled threshold.
    moved = (0.5 * cosines - 0.2).astype(np.float32)
    assert num_mates(moved, 1000) == pytest.approx(mates, rel=0.02)


def test_order_of_images_and_lengths_of_lists_do_not_matter():
    features, _, cameras = draw(2, 20, 4, noise=1.5)
    order = np.random.default_rng(3).permutation(len(features))
    before, after = suggest(features, cameras), suggest(features[order], cameras[order])
    assert before.threshold == pytest.approx(after.threshold, abs=1e-3)
    assert before.is_clear == after.is_clear


@pytest.mark.parametrize("count", [12, 60, 600])
@pytest.mark.parametrize("across", [True, False])
def test_features_of_other_persons_only_are_unclear(count, across):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        features = unit(rng.normal(size=(count, 64)) + rng.choice([0.0, 0.6]))
        cameras = np.array(["a", "b", "c"], dtype=object)[np.arange(count) % 3]
        found = suggest(features, cameras if across else None)
        assert not found.is_clear
        assert "unclear" in str(found)
        assert -1.0 <= found.threshold <= 1.0


def test_guess_states_the_estimate():
    features, _, cameras = draw(4, 30, 3, noise=2.5)
    found = suggest(features, cameras)
    assert not found.is_clear
    assert f"{found.num_mates:.1f} images show the person" in str(found)


def test_index_compares_cameras_only_where_two_are_known(tmp_path):
    features, _, cameras = draw(5, 40, 2)
    known = filled(tmp_path / "known", features, cameras=cameras.tolist())
    plain = known.suggest_threshold()
    assert known.suggest_threshold(across_cameras=True).threshold != plain.threshold
    for name, names in (("none", [None]), ("one", ["a"]), ("few", ["a"])):
        names = names * len(features)
        if name == "few":
            names[3] = "b"
        index = filled(tmp_path / name, features, cameras=names)
        found = index.suggest_threshold(across_cameras=True)
        if name != "few":
            assert found == plain
        assert -1.0 <= found.threshold <= 1.0
    few = filled(tmp_path / "three", features[:3], cameras=["a", "a", "b"])
    assert not few.suggest_threshold(across_cameras=True).is_clear
