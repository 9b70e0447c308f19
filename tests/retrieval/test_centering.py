"""Searches in centered features equal searches in an index of centered features."""

import logging

import numpy as np
import pytest
import torch

from helpers.indexes import filled, unit
from selcon_plugin.clustering.camera_centering import center_cameras
from selcon_plugin.retrieval import Index, centering, search


@pytest.fixture
def features():
    """Persons of three cameras that move all features, and a few of unknown camera."""
    rng = np.random.default_rng(0)
    people = np.repeat(rng.normal(size=(120, 16)), 3, axis=0)
    shifts = 2.0 * rng.normal(size=(3, 16))
    rows = people + shifts[np.arange(360) % 3] + 0.1 * rng.normal(size=people.shape)
    return unit(np.concatenate([rows, rng.normal(size=(40, 16))]))


@pytest.fixture
def cameras():
    return [*(["a", "b", "c"] * 120), *([None] * 30), *(["d"] * 10)]


@pytest.fixture
def index(tmp_path, features, cameras):
    return filled(tmp_path / "index", features, cameras=cameras)


def centered(features, cameras):
    ids = {"a": 0, "b": 1, "c": 2, "d": 3, None: -1}
    camids = torch.tensor([ids[camera] for camera in cameras])
    return center_cameras(torch.from_numpy(features), camids).numpy()


@pytest.mark.parametrize("rows_at_once", [16_384, 7])
def test_equals_the_search_in_centered_features(
    monkeypatch, index, features, cameras, rows_at_once
):
    monkeypatch.setattr(centering, "_ROWS_AT_ONCE", rows_at_once)
    rows = [0, 1, 2, 365, 395]
    cosines = centered(features, cameras)[rows] @ centered(features, cameras).T
    found = index.search(
        features[rows],
        top=400,
        center_cameras=True,
        query_cameras=[cameras[row] for row in rows],
    )
    for query, matches in enumerate(found):
        got = {int(m.path[7:-4]): m.similarity for m in matches}
        assert [got[row] for row in range(400)] == pytest.approx(cosines[query], abs=1e-5)


def test_finds_more_of_the_same_person_in_other_cameras(index, features):
    def hits(**options):
        found = index.search(
            features[:360:3],
            top=2,
            not_camera=["a", "d"],
            query_cameras=["a"] * 120,
            **options,
        )
        return sum(
            int(match.path[7:-4]) // 3 == person
            for person, matches in enumerate(found)
            for match in matches
        )

    assert hits(center_cameras=True) > 1.3 * hits()


def test_removed_images_enter_no_mean(index, features, cameras):
    index.remove("/crops/1?.jpg")
    left = [row for row in range(400) if not 10 <= row < 20]
    kept = [cameras[row] for row in left]
    cosines = centered(features[left], kept) @ centered(features[left], kept)[0]
    (found,) = index.search(features[:1], top=400, center_cameras=True, query_cameras=["a"])
    got = {int(m.path[7:-4]): m.similarity for m in found}
    assert [got[row] for row in left] == pytest.approx(cosines, abs=1e-5)


def test_query_of_unknown_camera_stays_as_it_is(index, features, cameras):
    own = centered(features, cameras)
    (found,) = index.search(features[:1], top=1, center_cameras=True)
    assert found[0].similarity == pytest.approx((own @ features[0]).max(), abs=1e-5)


def test_camera_of_a_query_is_that_of_the_index(
    monkeypatch, tmp_path, folder, embedder, caplog
):
    monkeypatch.setattr(centering, "MIN_IMAGES_PER_CAMERA", 12)
    index = Index.create(tmp_path / "index", embedder)
    index.add(folder, embedder)
    known, copy = folder / "cam0/p2_0.png", tmp_path / "copy.png"
    copy.write_bytes(known.read_bytes())
    assert index.cameras_of([str(known), str(copy), ""]) == ["cam0", None, None]
    asked = {"embedder": embedder, "center_cameras": True}
    with caplog.at_level(logging.WARNING):
        search(index, [known], **asked)
        search(index, [copy], query_camera="cam0", **asked)
        assert not caplog.records
        search(index, [known, copy], **asked)
    assert "1 of 2 queries" in caplog.text


def test_wrong_arguments_are_named(tmp_path, index, features):
    for wrong in ("a", ["a", "b"]):
        with pytest.raises(ValueError, match=r"^query_cameras must be a list of 1 names"):
            index.search(features[:1], center_cameras=True, query_cameras=wrong)
    with pytest.raises(ValueError, match="from camera 'x'; its cameras are a, b, c, d"):
        index.search(features[:1], center_cameras=True, query_cameras=["x"])
    index.remove("/crops/*.jpg")
    with pytest.raises(ValueError, match=r"100 images.*no known camera"):
        index.search(features[:1], center_cameras=True)
