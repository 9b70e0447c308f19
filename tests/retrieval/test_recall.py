"""Approximate search against the exact one: filters, removals, clustered features."""

import logging

import numpy as np
import pytest

from helpers.indexes import filled, unit
from selcon_plugin.retrieval import Index, approximate, nearest
from selcon_plugin.retrieval.approximate import Approximate
from selcon_plugin.retrieval.nearest import MIN_RECALL

pytest.importorskip("faiss")

DIM, TOP = 32, 10
KINDS = ("hnsw", "ivf")


def persons(people, cameras, frames, *, seed=0, camera_effect=0.7):
    """Frames of people whose features depend on the camera as much as on the person."""
    rng = np.random.default_rng(seed)
    number = np.arange(people * cameras * frames)
    person, camera = number % people, number // people % cameras
    looks = rng.normal(size=(people, DIM))
    views = camera_effect * rng.normal(size=(cameras, DIM))
    noise = 0.35 * rng.normal(size=(len(number), DIM))
    return unit(looks[person] + views[camera] + noise), camera


def made(folder, features, cameras, kind):
    index = filled(folder, features, cameras=[f"cam{c}" for c in cameras], kind=kind)
    assert index.kind == kind
    return index


def recall(index, features, queries, allowed, **options):
    """Fraction of the exact nearest that are found; nothing else may be."""
    hits = total = 0
    for query in queries:
        cosines = np.where(allowed, features @ query, -np.inf)
        count = min(TOP, int(allowed.sum()))
        want = np.sort(cosines)[::-1][:count]
        (matches,) = index.search(query[None], top=TOP, **options)
        rows = [int(match.path[7:-4]) for match in matches]
        assert allowed[rows].all()
        assert len(set(rows)) == len(rows) == count
        hits += int((cosines[rows] >= want[-1] - 1e-6).sum())
        total += count
    return hits / total


@pytest.fixture(params=["always approximate", "as delivered"])
def few(request, monkeypatch):
    """Search small subsets of the rows by the approximate search as well, or exactly."""
    if request.param == "always approximate":
        monkeypatch.setattr(nearest, "_FEW_ROWS", 0)
        monkeypatch.setattr(nearest, "_FEW_RATIO", 0.0)


@pytest.fixture(scope="module")
def clustered():
    return persons(10, 4, 150)


@pytest.mark.parametrize("kind", KINDS)
def test_other_cameras_are_found_behind_many_similar_images(tmp_path, few, kind, clustered):
    features, cameras = clustered
    index = made(tmp_path / "index", features, cameras, kind)
    assert index.recall.filtered >= 0.98
    for camera in range(4):
        queries = features[cameras == camera][::150]
        name = f"cam{camera}"
        other, own = cameras != camera, cameras == camera
        assert recall(index, features, queries, other, not_camera=[name]) >= 0.99
        assert recall(index, features, queries, own, camera=[name]) >= 0.99


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", ["random", "nearest", "farthest"])
def test_recall_does_not_depend_on_the_filter(tmp_path, few, kind, spread, clustered):
    features, _ = clustered
    rng = np.random.default_rng(1)
    order = rng.permutation(len(features))
    if spread != "random":  # the filter leaves the rows that are most or least similar
        order = np.argsort(features @ features[0])
        order = order[::-1] if spread == "nearest" else order
    cameras = np.full(len(features), "rest", dtype=object)
    for number, ratio in enumerate((0.001, 0.01, 0.1, 0.5)):
        size = max(1, int(ratio * len(features)))
        cameras[order[:size]], order = f"{number}", order[size:]
    index = made(tmp_path / "index", features, cameras, kind)
    queries = np.concatenate([features[:3], unit(rng.normal(size=(3, DIM)))])
    for number in "0123":
        allowed = np.array([camera == number for camera in cameras])
        found = recall(index, features, queries, allowed, camera=[f"cam{number}"])
        assert found >= 0.95
        rest = recall(index, features, queries, ~allowed, not_camera=[f"cam{number}"])
        assert rest >= 0.95


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("removed", [0.3, 0.5, 0.9])
def test_recall_after_removals(tmp_path, few, kind, removed, clustered):
    features, cameras = clustered
    index = made(tmp_path / "index", features, cameras, kind)
    # First the rows nearest to the queries: the others are far away in the graph.
    queries = features[:6]
    order = np.argsort(-(features @ queries.T).max(axis=1))
    gone = order[: int(removed * len(features))]
    with index._store.writing():
        index._store.remove(gone.tolist())
        index._maintain()
    allowed = np.ones(len(features), dtype=bool)
    allowed[gone] = False
    assert len(index) == allowed.sum()
    assert recall(index, features, queries, allowed) >= 0.95
    camera = cameras[allowed][0]
    other, name = allowed & (cameras != camera), f"cam{camera}"
    if other.any():
        assert recall(index, features, queries, other, not_camera=[name]) >= 0.95
    assert abs(index.recall.num_images - len(index)) <= 0.2 * len(index)


@pytest.mark.parametrize("kind", KINDS)
def test_recall_is_measured_stored_and_shown(tmp_path, kind, clustered):
    features, cameras = clustered
    index = made(tmp_path / "index", features, cameras, kind)
    again = Index.open(tmp_path / "index")
    assert again.recall == index.recall
    assert again.recall.plain >= 0.98
    assert (again.recall.num_queries, again.recall.num_images) == (64, len(features))
    assert f"recall@10 {again.recall.plain:.3f}, with a filter" in str(again)
    flat = made(tmp_path / "flat", features[:50], cameras[:50], "flat")
    assert flat.recall is None
    assert "recall" not in str(flat)


def test_search_that_finds_too_little_is_not_used(tmp_path, monkeypatch, caplog, clustered):
    features, cameras = clustered
    monkeypatch.setattr(nearest, "_FEW_ROWS", 0)

    def find(self, queries, count, allowed):  # any allowed rows
        return [np.flatnonzero(allowed)[:count] for _ in queries]

    with monkeypatch.context() as patch:
        patch.setattr(Approximate, "candidates", find)
        with caplog.at_level(logging.WARNING):
            index = made(tmp_path / "index", features, cameras, "hnsw")
        assert not index.recall.is_enough
        assert index.recall.plain < MIN_RECALL
        assert "searched exactly" in caplog.text
        assert "exact, because hnsw" in str(index)
        everything = np.ones(len(features), dtype=bool)
        for one in (index, Index.open(tmp_path / "index")):
            assert recall(one, features, features[:5], everything) == 1.0
    # It is measured again when enough has changed.
    with index._store.writing():
        index._store.remove(list(range(0, len(features), 3)))
        index._maintain()
    assert index.recall.is_enough


def test_effort_is_raised_until_the_recall_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(approximate, "_BREADTHS", (4, 8, 512))
    monkeypatch.setattr(nearest, "_MIN_CANDIDATES", 1)
    monkeypatch.setattr(nearest, "_CANDIDATES_PER_RESULT", 1)
    rng = np.random.default_rng(2)  # no structure: the hardest case for a graph
    features = unit(rng.normal(size=(3000, DIM)))
    index = made(tmp_path / "index", features, np.zeros(3000, dtype=int), "hnsw")
    assert index._store.manifest.approximate["effort"] == 2
    assert index.recall.plain >= 0.95
    everything = np.ones(len(features), dtype=bool)
    queries = unit(rng.normal(size=(20, DIM)))
    assert recall(Index.open(tmp_path / "index"), features, queries, everything) >= 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_equal_images(tmp_path, few, kind):
    rng = np.random.default_rng(3)
    features = unit(rng.normal(size=(40, DIM)))[np.arange(4000) % 40]
    cameras = np.arange(4000) % 5
    index = made(tmp_path / "index", features, cameras, kind)
    assert recall(index, features, features[:5], cameras != 0, not_camera=["cam0"]) > 0.95
