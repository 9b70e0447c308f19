import itertools
import time
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from selcon_plugin.samplers.cluster import ClusterSampler
from selcon_plugin.samplers.planners import (
    PlanSettings,
    planner_named,
    planner_names,
    register_planner,
)
from selcon_plugin.samplers.stream import SampleKey, StreamSampler

CLUSTER_PLANNERS = ["group", "pk", "pk_camera", "proxy"]


def draw(sampler, count):
    return list(itertools.islice(sampler, count))


def batches_of(sampler, start, count):
    return np.stack(draw(sampler.batches(start), count))


def clusters(num_images=300, seed=0):
    """Return unequal clusters, three of them singletons, outliers, and unknown cameras."""
    rng = np.random.default_rng(seed)
    labels = np.minimum(rng.geometric(0.12, num_images), 21) - 2
    labels[:23] = np.arange(23)
    order = rng.permutation(num_images)
    return labels[order], rng.integers(-1, 4, num_images)


def plan(name, labels, camids=None, *, seed=0, batch_size=8, num_instances=4, group_size=5):
    return planner_named(name)(
        np.asarray(labels),
        None if camids is None else np.asarray(camids),
        PlanSettings(batch_size, num_instances, group_size),
        np.random.default_rng(seed),
    )


def cluster_sampler(labels, camids=None, start_batch=0, **settings):
    sampler = ClusterSampler(**{"batch_size": 16, "num_instances": 4} | settings)
    sampler.set_labels(labels, camids, start_batch)
    return sampler


# ---- StreamSampler ----


def test_every_pass_shows_every_image_once_in_another_order():
    sampled = [key.index for key in draw(StreamSampler(50, seed=1), 150)]
    passes = [sampled[start : start + 50] for start in (0, 50, 100)]
    assert all(sorted(one) == list(range(50)) for one in passes)
    assert passes[0] != passes[1] != passes[2]


def test_position_in_the_stream_does_not_need_the_previous_ones():
    stream = draw(StreamSampler(10, seed=3, batch_size=4), 35)
    for position, key in enumerate(stream):
        number, place = divmod(position, 10)
        order = np.random.default_rng((3, number)).permutation(10)
        assert key == SampleKey(order[place], position)


@pytest.mark.parametrize("batch_size", [2, 7, 50, 120])
def test_size_of_the_batch_does_not_change_the_stream(batch_size):
    expected = draw(StreamSampler(50, seed=1), 300)
    assert draw(StreamSampler(50, seed=1, batch_size=batch_size), 300) == expected


def test_same_seed_same_stream_other_seed_other_stream():
    assert draw(StreamSampler(50, seed=1), 60) == draw(StreamSampler(50, seed=1), 60)
    assert draw(StreamSampler(50, seed=1), 60) != draw(StreamSampler(50, seed=2), 60)


@pytest.mark.parametrize("batch_size", [1, 8, 75])
@pytest.mark.parametrize("start", [0, 1, 7, 50])
def test_resumed_stream_continues_where_it_stopped(start, batch_size):
    sampler = StreamSampler(50, seed=4, batch_size=batch_size)
    skipped = start * batch_size
    expected = draw(sampler, skipped + 90)[skipped:]
    sampler.start = start
    assert draw(sampler, 90) == expected


def test_no_images_is_an_error():
    with pytest.raises(ValueError, match="no images"):
        StreamSampler(0)


# ---- all samplers ----


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


# ---- P x K ----


@pytest.mark.parametrize("name", ["pk", "pk_camera", "proxy"])
@pytest.mark.parametrize("seed", range(5))
def test_every_batch_is_p_clusters_of_k_images(name, seed):
    labels, camids = clusters(seed=seed)
    key = labels * 10 + camids if name == "proxy" else labels
    known = set(key[labels >= 0].tolist())
    sampled = plan(name, labels, camids, seed=seed, batch_size=32)
    assert sampled.dtype == np.int64
    assert sampled.shape == (-(-len(known) // 8), 32)
    assert (labels[sampled] >= 0).all()
    blocks = key[sampled].reshape(len(sampled), 8, 4)
    assert (blocks == blocks[:, :, :1]).all()  # the K images of a cluster are contiguous
    of_block = blocks[:, :, 0]
    assert all(len(set(batch)) == 8 for batch in of_block.tolist())
    # All clusters occur once, except those that fill the last batch.
    in_order = of_block.ravel().tolist()
    assert sorted(in_order[: len(known)]) == sorted(known)
    assert in_order[len(known) :] == in_order[: len(in_order) - len(known)]
    assert in_order[: len(known)] != sorted(known)


@pytest.mark.parametrize("name", ["pk", "proxy"])
def test_images_of_a_block_differ_where_there_are_enough(name):
    labels, camids = clusters()
    key = labels * 10 + camids if name == "proxy" else labels
    size = Counter(key.tolist())
    for block in plan(name, labels, camids).reshape(-1, 4):
        times = Counter(block.tolist())
        expected = min(4, size[key[block[0]]])
        assert len(times) == expected
        # Copies are distributed evenly.
        assert max(times.values()) == -(-4 // expected)


@pytest.mark.parametrize("seed", range(5))
def test_camera_rule_block_by_block(seed):
    labels, camids = clusters(seed=seed)
    seen = Counter()
    for anchor, *rest in plan("pk_camera", labels, camids, seed=seed).reshape(-1, 4):
        same = set(np.flatnonzero(labels == labels[anchor]).tolist())
        others = {i for i in same if camids[i] != camids[anchor] and camids[anchor] >= 0}
        if others:
            seen["across cameras"] += 1
            assert set(rest) <= others
            assert len(set(rest)) == min(3, len(others))
        else:
            seen["single image" if len(same) == 1 else "one camera"] += 1
            assert set(rest) <= same
            assert len({anchor, *rest}) == min(4, len(same))
    assert seen["across cameras"]
    assert seen["one camera"]


def test_cluster_of_one_image_gives_k_copies():
    labels = [0, 1, 1, 1, 1, 1]
    sampled = plan("pk_camera", labels, [0, 0, 1, 2, 3, 4])
    blocks = sorted(sampled.reshape(-1, 4).tolist())
    assert blocks[0] == [0, 0, 0, 0]
    assert len(set(blocks[1])) == 4


def test_cluster_of_one_camera_is_sampled_within_the_camera():
    sampled = plan("pk_camera", [0] * 4, [2] * 4, batch_size=4)
    assert sorted(sampled[0].tolist()) == [0, 1, 2, 3]


def test_few_images_of_other_cameras_are_repeated_cyclically():
    # Whichever of images 0..3 is the anchor, only image 4 is from another camera.
    for seed in range(10):
        [batch] = plan("pk_camera", [0] * 5, [1, 1, 1, 1, 2], seed=seed, batch_size=4)
        if batch[0] == 4:
            assert len(set(batch.tolist())) == 4
        else:
            assert batch[1:].tolist() == [4, 4, 4]


@pytest.mark.parametrize("camids", [None, np.full(300, -1)])
def test_without_cameras_the_camera_rule_is_plain_pk(camids):
    labels, _ = clusters()
    assert np.array_equal(plan("pk_camera", labels, camids), plan("pk", labels))


def test_images_are_anchors_and_positives_about_equally_often():
    camids = [0, 0, 0, 1, 1, 2]
    blocks = np.concatenate(
        [plan("pk_camera", [0] * 6, camids, seed=s, batch_size=4) for s in range(3000)]
    )
    anchors = np.bincount(blocks[:, 0], minlength=6) / 3000
    assert anchors == pytest.approx(np.full(6, 1 / 6), abs=0.03)
    # After an anchor of camera 1 come three of the four images of the other cameras.
    mates = blocks[blocks[:, 0] == 3][:, 1:]
    share = np.bincount(mates.ravel(), minlength=6) / len(mates)
    assert share == pytest.approx([0.75, 0.75, 0.75, 0, 0, 0.75], abs=0.06)


def test_fewer_clusters_than_p_are_repeated_with_other_images():
    labels = np.repeat([0, 1, -1], 12)
    [batch] = plan("pk", labels, batch_size=24)
    assert sorted(batch.tolist()) == list(range(24))  # 3 times 4 images cover each cluster
    [batch] = plan("pk_camera", labels, np.arange(36) % 3, batch_size=24)
    assert Counter(labels[batch].tolist()) == {0: 12, 1: 12}
    assert len({block[0] for block in batch.reshape(-1, 4).tolist()}) == 6  # anchors


# ---- Proxies ----


def test_a_pass_samples_every_proxy_equally_often():
    # Camera 0 has ten images of cluster 0, camera 1 and cluster 1 have two each.
    labels = [0] * 12 + [1] * 2 + [-1]
    camids = [0] * 10 + [1] * 2 + [0] * 2 + [0]
    sampled = plan("proxy", labels, camids, batch_size=12)
    of_proxy = Counter((labels[i], camids[i]) for i in sampled.ravel())
    assert of_proxy == {(0, 0): 4, (0, 1): 4, (1, 0): 4}


def test_without_cameras_every_cluster_is_a_proxy():
    labels, _ = clusters()
    assert np.array_equal(plan("proxy", labels), plan("pk", labels))
    assert np.array_equal(plan("proxy", labels, np.full(300, -1)), plan("pk", labels))


# ---- Groups ----


@pytest.mark.parametrize("group_size", [1, 5, 1000])
def test_groups_are_concatenated_chunks_of_clusters(group_size):
    labels, _ = clusters()
    # One batch as long as the sequence shows the sequence itself.
    length = int((labels >= 0).sum())
    [line] = plan("group", labels, batch_size=length, group_size=group_size)
    assert sorted(line.tolist()) == np.flatnonzero(labels >= 0).tolist()
    size = Counter(labels[line].tolist())
    runs = [(label, len(list(run))) for label, run in itertools.groupby(labels[line])]
    # Full groups, and from each cluster one run of the remaining images.
    left_over = [(label, n % group_size) for label, n in runs if n % group_size]
    expected = [(label, n % group_size) for label, n in size.items() if n % group_size]
    assert sorted(left_over) == sorted(expected)
    # The groups of a large cluster do not stay together.
    assert (len(runs) > len(size)) == (group_size < 1000)
    is_single = [size[label] == 1 for label, _ in runs]
    assert is_single == sorted(is_single)
    assert sum(is_single) == 3


def test_group_batches_hold_whole_clusters():
    labels = np.repeat(np.arange(10), 8)
    sampled = plan("group", labels, batch_size=16, group_size=8)
    for batch in sampled:
        assert sorted(Counter(labels[batch].tolist()).values()) == [8, 8]
    assert sorted(sampled.ravel().tolist()) == list(range(80))
    assert (np.diff(sampled[0]) != 1).any()  # the images of a cluster are shuffled


def test_group_batches_come_in_random_order():
    labels = [*np.repeat(np.arange(10), 2), *range(10, 20)]  # ten of two, ten of one
    is_single = [
        plan("group", labels, seed=s, batch_size=10)[:, 0] >= 20 for s in range(20)
    ]
    assert {tuple(one) for one in np.array(is_single).tolist()} == {
        (True, False, False),
        (False, True, False),
        (False, False, True),
    }


@pytest.mark.parametrize("name", ["group", "shuffle"])
def test_last_batch_is_filled_and_no_image_omitted(name):
    labels = np.repeat(np.arange(5), 5)  # 25 images: 3 batches of 10
    sampled = plan(name, labels, batch_size=10, num_instances=1)
    times = Counter(sampled.ravel().tolist())
    assert sampled.shape == (3, 10)
    assert sorted(times) == list(range(25))
    assert sorted(times.values()) == [1] * 20 + [2] * 5


# ---- Every planner ----


@pytest.mark.parametrize("name", planner_names())
def test_pass_depends_only_on_the_generator(name):
    labels, camids = clusters()
    first = plan(name, labels, camids, seed=1)
    assert np.array_equal(plan(name, labels, camids, seed=1), first)
    assert not np.array_equal(plan(name, labels, camids, seed=2), first)


@pytest.mark.parametrize("name", planner_names())
def test_one_image_is_enough_for_a_batch(name):
    assert plan(name, [0], [0]).tolist() == [[0] * 8]
    assert set(plan(name, [-1, 3, -1], [0, 0, 1]).ravel()) >= {1}


@pytest.mark.parametrize("name", CLUSTER_PLANNERS)
def test_all_outliers_is_an_error_that_names_the_remedy(name):
    with pytest.raises(ValueError, match=r"all 3 images are outliers.*'shuffle'"):
        plan(name, [-1, -1, -1], [0, 0, 0])


@pytest.mark.parametrize("name", planner_names())
def test_many_images_in_many_clusters_are_planned_at_once(name):
    labels, camids = np.arange(100_000) // 10, np.arange(100_000) % 7
    started = time.perf_counter()
    plan(name, labels, camids, batch_size=256, num_instances=16)
    assert time.perf_counter() - started < 2  # about 0.05 s


def test_shuffle_samples_outliers_too():
    assert sorted(plan("shuffle", [-1] * 8)[0].tolist()) == list(range(8))


def test_planner_names_are_unique_and_unknown_ones_listed():
    assert planner_names() == ["group", "pk", "pk_camera", "proxy", "shuffle"]
    with pytest.raises(ValueError, match="unknown planner 'pkc'; known are group, pk"):
        ClusterSampler(batch_size=4, planner="pkc")
    with pytest.raises(ValueError, match="'pk' is already registered"):
        register_planner("pk")(planner_named("pk"))


# ---- ClusterSampler ----


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
