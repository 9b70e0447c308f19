"""Records of a run for its report, against definitions by loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from selcon_plugin.clustering import DBSCANLabeler, PseudoLabels
from selcon_plugin.runs.embedding import (
    OTHER_CAMERA,
    SAME_CAMERA,
    SAME_CLUSTER,
    UNKNOWN_CAMERA,
    EmbeddingRecord,
    record_embedding,
)
from selcon_plugin.runs.metrics import LossAverage, append_metrics, read_metrics
from selcon_plugin.runs.ranked import rank_queries, read_ranked, write_ranked


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    centers = 2 * torch.randn(5, 8, generator=generator)
    return centers.repeat_interleave(6, 0) + torch.randn(30, 8, generator=generator)


CAMIDS = torch.tensor([0, 1, -1] * 10)


def group_of(i, j, labels):
    if min(CAMIDS[i], CAMIDS[j]) < 0:
        rows = [UNKNOWN_CAMERA]
    else:
        rows = [SAME_CAMERA if CAMIDS[i] == CAMIDS[j] else OTHER_CAMERA]
    return rows + [SAME_CLUSTER] * bool(labels[i] == labels[j] >= 0)


def test_stored_distances_are_counted(features):
    found = DBSCANLabeler(eps=0.6, min_samples=2, k1=6, k2=2)(features)
    assert found.num_clusters > 1
    record = record_embedding(features, CAMIDS, found, epoch=3)
    dense, stored = found.distance.toarray(), found.distance.toarray() != 0
    expected = np.zeros_like(record.counts)
    for i in range(30):
        for j in range(30):
            if i != j and stored[i, j] and dense[i, j] < 1:
                for row in group_of(i, j, found.labels):
                    expected[row, min(int(dense[i, j] * 50), 49)] += 1
    # Single precision may put a distance on the other side of a bin's edge.
    assert (record.counts.sum(axis=1) == expected.sum(axis=1)).all()
    assert np.abs(np.cumsum(record.counts - expected, axis=1)).max() <= 2
    assert record.eps == 0.6
    assert (record.distance, record.epoch, record.clustered) == ("Jaccard", 3, True)


def test_cosines_and_silhouettes_without_a_graph(features):
    labels = torch.arange(30) // 6
    labels[7] = -1
    record = record_embedding(features, CAMIDS, PseudoLabels(labels), epoch=0)
    unit = F.normalize(features, dim=1)
    expected = np.zeros(4, dtype=int)
    for i in range(30):
        for j in range(i):
            for row in group_of(i, j, labels):
                expected[row] += 1
    assert record.counts.sum(axis=1).tolist() == expected.tolist()
    centers = F.normalize(torch.stack([unit[labels == c].sum(0) for c in range(5)]), dim=1)
    for i in (0, 13, 29):
        to = 1 - centers @ unit[i]
        own = to[labels[i]].item()
        other = min(to[c].item() for c in range(5) if c != labels[i])
        expected_silhouette = (other - own) / max(other, own)
        assert record.silhouette[i] == pytest.approx(expected_silhouette, abs=2e-3)
    assert math.isnan(record.silhouette[7])


def test_neighbors_and_points_are_those_of_the_features(features):
    features[4] = 0  # unreadable
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    record = record_embedding(features, CAMIDS, None, epoch=1)
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == np.random.get_state()[1].tolist()  # noqa: NPY002
    assert 4 not in record.sample
    assert not record.clustered
    unit = F.normalize(features, dim=1)
    for anchor, row in zip(record.anchors, record.neighbors, strict=True):
        cosines = unit @ unit[anchor]
        cosines[anchor] = -2
        assert row.tolist() == cosines.argsort(descending=True)[:10].tolist()
    # All components are kept here, so the distances equal those of the features.
    points = torch.from_numpy(record.points.astype(np.float32))
    kept = unit[record.sample.tolist()]
    assert torch.allclose(torch.cdist(points, points), torch.cdist(kept, kept), atol=5e-3)


def test_record_that_is_broken_is_refused(features, tmp_path):
    file = record_embedding(features, CAMIDS, None, epoch=1).save(tmp_path)
    again = EmbeddingRecord.load(tmp_path)
    assert again.epoch == 1
    with np.load(file) as arrays:
        values = dict(arrays)
    for change in ({"sample": values["sample"] + 1}, {"points": values["points"][1:]}):
        np.savez(file, **{**values, **change})
        with pytest.raises(ValueError, match=r"embedding\.npz is broken"):
            EmbeddingRecord.load(tmp_path)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match="is broken"):
        EmbeddingRecord.load(tmp_path)


def test_ranked_queries_by_hand(tmp_path):
    query = [("q.jpg", 1, 0)]
    gallery = [("own.jpg", 1, 0), ("a.jpg", 2, 1), ("b.jpg", 1, 1), ("c.jpg", 1, 2)]
    (ranked,) = rank_queries([[0.0, 0.1, 0.2, 0.3]], query, gallery)
    assert [(r.path, r.right) for r in ranked.results] == [
        *(("a.jpg", False), ("b.jpg", True), ("c.jpg", True))
    ]
    assert ranked.average_precision == pytest.approx((1 / 2 + 2 / 3) / 2)
    write_ranked(tmp_path, "one", [ranked])
    write_ranked(tmp_path, "two", [])
    assert read_ranked(tmp_path) == {"one": [ranked], "two": []}
    (tmp_path / "ranked.json").write_text('{"one": [{"path": 1}]}')
    with pytest.raises(ValueError, match=r"ranked\.json is damaged"):
        read_ranked(tmp_path)


def test_metrics_are_read_as_written(tmp_path):
    losses = LossAverage()
    losses.add({"loss": 2.0, "loss_a": 1.0})
    losses.add({"loss": 4.0, "loss_a": 3.0})
    append_metrics(tmp_path, 9, {**losses.take(), "bad": float("nan")})
    append_metrics(tmp_path, 10, losses.take())
    append_metrics("", 11, {"a": 1.0})
    assert read_metrics(tmp_path / "metrics.json") == [
        {"iteration": 9, "total_loss": 3.0, "loss_a": 2.0}
    ]
