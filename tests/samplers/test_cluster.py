"""``ClusterSampler``, and what it shares with ``StreamSampler``."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from helpers.sampling import batches_of, cluster_sampler, clusters, draw, plan
from selcon_plugin.samplers.cluster import ClusterSampler
from selcon_plugin.samplers.planners import (
    PlanSettings,
    planner_named,
    planner_names,
)
from selcon_plugin.samplers.stream import SampleKey, StreamSampler


def any_sampler(kind, **settings):
    if kind == "stream":
        return StreamSampler(20, batch_size=12, **settings)
    labels, camids = clusters()
    return cluster_sampler(
        labels, camids, batch_size=12, num_instances=2, outlier_ratio=0.3, **settings
    )


@pytest.mark.parametrize("kind", ["stream", "cluster"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_slices_of_the_ranks_join_to_the_batch_of_one_process(kind, world_size):
    single = draw(any_sampler(kind, seed=1), 60)
    ranks = [
        iter(any_sampler(kind, seed=1, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    joined = []
    for _ in range(5):
        for stream in ranks:
            joined += draw(stream, 12 // world_size)
    assert joined == single
    assert [key.position for key in joined] == list(range(60))


@pytest.mark.parametrize("kind", ["stream", "cluster"])
@pytest.mark.parametrize("batch_size", [0, 10])
def test_batch_must_divide_among_the_processes(kind, batch_size):
    settings = {"batch_size": batch_size, "world_size": 4}
    message = rf"batch_size \({batch_size}, .*processes \(4\)"
    with pytest.raises(ValueError, match=message):
        _ = (
            StreamSampler(20, **settings)
            if kind == "stream"
            else ClusterSampler(**settings)
        )


class Keys(Dataset):
    def __getitem__(self, key):
        return key.index, key.position


@pytest.mark.parametrize("kind", ["stream", "cluster"])
def test_loader_with_workers_sees_the_same_keys(kind):
    sampler = any_sampler(kind)
    expected = draw(sampler, 36)
    # FastReID's train loader batches a sampler this way.
    loader = DataLoader(
        Keys(), batch_sampler=BatchSampler(sampler, 12, True), num_workers=2
    )
    seen = [torch.stack(batch, dim=1).tolist() for batch in draw(loader, 3)]
    assert [SampleKey(*pair) for batch in seen for pair in batch] == expected


@pytest.mark.parametrize("planner", planner_names())
@pytest.mark.parametrize("outlier_ratio", [0, 0.25])
@pytest.mark.parametrize("start", [3, 5, 24])
def test_resumed_epoch_continues_where_it_stopped(planner, outlier_ratio, start):
    labels, camids = clusters()
    settings = {"planner": planner, "outlier_ratio": outlier_ratio, "seed": 2}
    unbroken = draw(cluster_sampler(labels, camids, 3, **settings), 25 * 16)
    resumed = cluster_sampler(labels, camids, 3, **settings)
    assert resumed.start == 3
    resumed.start = start
    assert draw(resumed, 16) == unbroken[(start - 3) * 16 :][:16]
    assert unbroken[0].position == 3 * 16


def test_epoch_is_the_planners_passes_one_after_the_other():
    labels, camids = clusters()
    sampler = cluster_sampler(labels, camids, 3, seed=7)
    settings = PlanSettings(16, 4, 256)
    passes = [
        planner_named("pk_camera")(
            labels, camids, settings, np.random.default_rng((7, 3, n))
        )
        for n in range(3)
    ]
    assert np.array_equal(batches_of(sampler, 3, 18), np.concatenate(passes))


@pytest.mark.parametrize("planner", planner_names())
def test_passes_epochs_and_seeds_differ(planner):
    labels, camids = clusters()
    first = cluster_sampler(labels, camids, planner=planner)
    in_pass = len(plan(planner, labels, camids, batch_size=16))
    passes = batches_of(first, 0, 2 * in_pass)
    assert not np.array_equal(passes[:in_pass], passes[in_pass:])
    other_epoch = cluster_sampler(labels, camids, in_pass, planner=planner)
    for drawn_before in (passes[:in_pass], passes[in_pass:]):
        assert not np.array_equal(batches_of(other_epoch, in_pass, in_pass), drawn_before)
    other_seed = cluster_sampler(labels, camids, planner=planner, seed=1)
    assert not np.array_equal(batches_of(other_seed, 0, in_pass), passes[:in_pass])


@pytest.mark.parametrize("planner", planner_names())
def test_quota_of_outliers_is_exact_and_spread_evenly(planner):
    labels, camids = clusters()
    sampler = cluster_sampler(
        labels, camids, planner=planner, batch_size=64, outlier_ratio=0.25
    )
    assert sampler.outliers_per_batch == 16
    sampled = batches_of(sampler, 0, 40)
    is_outlier = labels[sampled] == -1
    # Of the 16 consecutive places of a rank's slice, 4 are outliers.
    assert (is_outlier.reshape(40, 4, 16).sum(axis=2) == 4).all()
    # Each outlier occurs once, then all again in another order.
    outliers = np.flatnonzero(labels == -1)
    shown = sampled[is_outlier]
    first, second = shown[: len(outliers)], shown[len(outliers) : 2 * len(outliers)]
    assert sorted(first.tolist()) == sorted(second.tolist()) == outliers.tolist()
    assert first.tolist() != second.tolist()
    # The rest equals the planner's smaller batches.
    inside = np.flatnonzero(labels >= 0)
    settings = PlanSettings(48, 4, 256)
    rng = np.random.default_rng((0, 0, 0))
    planned = planner_named(planner)(labels[inside], camids[inside], settings, rng)
    rest = sampled[~is_outlier].reshape(40, 48)
    assert np.array_equal(rest[: len(planned)], inside[planned])


@pytest.mark.parametrize(
    ("ratio", "expected"), [(0, 0), (0.01, 4), (0.3, 4), (0.4, 8), (0.99, 12)]
)
def test_quota_is_rounded_to_blocks_and_leaves_places_for_both(ratio, expected):
    sampler = ClusterSampler(batch_size=16, num_instances=4, outlier_ratio=ratio)
    assert sampler.outliers_per_batch == expected


def test_fewer_outliers_than_the_quota_are_repeated():
    sampler = cluster_sampler([0] * 6 + [-1] * 3, planner="pk", outlier_ratio=0.5)
    [batch] = batches_of(sampler, 0, 1)
    assert sorted(Counter(batch[batch >= 6].tolist()).values()) == [2, 3, 3]


def test_without_outliers_or_clusters_the_planner_fills_all():
    sampler = cluster_sampler([0, 0, 1, 1], planner="pk", outlier_ratio=0.5)
    [batch] = batches_of(sampler, 0, 1)
    assert Counter(batch.tolist()) == dict.fromkeys(range(4), 4)
    sampler.set_labels([-1] * 16, None, 1, planner="shuffle")
    [batch] = batches_of(sampler, 1, 1)
    assert sorted(batch.tolist()) == list(range(16))


def test_planner_of_one_epoch_is_replaced_by_the_samplers_own():
    labels, camids = clusters()
    sampler = ClusterSampler(batch_size=16, planner="pk")
    sampler.set_labels(labels, camids, 0, planner="shuffle")
    assert -1 in labels[batches_of(sampler, 0, 19)]
    sampler.set_labels(labels, camids, 19)
    assert -1 not in labels[batches_of(sampler, 19, 19)]


def test_iterator_keeps_the_labels_it_started_with():
    sampler = cluster_sampler([0] * 8, planner="pk")
    stream = iter(sampler)
    next(stream)
    sampler.set_labels([-1] * 8 + [0] * 8, None, 5)
    assert all(key.index < 8 for key in draw(stream, 40))
    again = draw(sampler, 40)
    assert all(key.index >= 8 for key in again)
    assert again[0].position == 5 * 16


def test_labels_are_copied_and_may_be_tensors(device):
    labels, camids = (torch.from_numpy(array) for array in clusters())
    expected = batches_of(cluster_sampler(labels.tolist(), camids.tolist()), 0, 10)
    sampler = ClusterSampler(batch_size=16)
    given = labels.to(device, copy=True)
    sampler.set_labels(given, camids.to(device), 0)
    given.fill_(-1)
    assert np.array_equal(batches_of(sampler, 0, 10), expected)
    array = labels.numpy().astype(np.int32)
    sampler.set_labels(array, camids.numpy(), 0)
    assert np.array_equal(batches_of(sampler, 0, 10), expected)


def test_sampling_before_labels_are_set_is_an_error():
    with pytest.raises(RuntimeError, match=r"set_labels\(\)"):
        next(iter(ClusterSampler(batch_size=16)))


def test_batch_of_an_earlier_epoch_is_an_error():
    sampler = cluster_sampler([0], start_batch=7)
    sampler.start = 6
    with pytest.raises(ValueError, match="batch 6 precedes batch 7"):
        next(iter(sampler))


def test_impossible_labels_leave_the_sampler_as_it_was():
    sampler = cluster_sampler([0, 0])
    with pytest.raises(ValueError, match="all 2 images are outliers"):
        sampler.set_labels([-1, -1], None, 9)
    assert sampler.start == 0
    assert len(draw(sampler, 20)) == 20


@pytest.mark.parametrize(
    ("labels", "camids", "message"),
    [
        ([0.0, 1.0], None, r"labels must be integers .*float64"),
        ([[0, 1]], None, r"labels must be integers .*\(1, 2\)"),
        ([0, 1], [0.5, 1], r"camids must be integers .*float64"),
        ([0, 1], [0], r"camids \(1\) and labels \(2\)"),
        (np.empty(0, dtype=np.int64), None, "no images"),
    ],
)
def test_wrong_labels_are_refused(labels, camids, message):
    with pytest.raises(ValueError, match=message):
        cluster_sampler(labels, camids)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_instances": 3}, r"batch_size \(16\).*num_instances \(3\)"),
        ({"num_instances": 0}, "num_instances .*1.*got 0"),
        ({"group_size": 0}, "group_size .*1.*got 0"),
        ({"outlier_ratio": 1.0}, r"outlier_ratio must lie in \[0, 1\), got 1.0"),
        ({"outlier_ratio": -0.1}, r"outlier_ratio must lie in \[0, 1\), got -0.1"),
        ({"outlier_ratio": 0.5, "num_instances": 16}, r"2 \* num_instances \(32\).*got 16"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ClusterSampler(**{"batch_size": 16} | settings)


def test_planner_that_plans_nothing_is_an_error_and_no_endless_loop(monkeypatch):
    sampler = ClusterSampler(batch_size=16)
    monkeypatch.setattr(sampler, "planner", lambda *_: np.empty((0, 16), dtype=np.int64))
    with pytest.raises(ValueError, match="without batches"):
        sampler.set_labels([0], None, 0)
