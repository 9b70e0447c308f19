"""The planners: what a pass of batches holds, block by block."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest

from helpers.sampling import CLUSTER_PLANNERS, clusters, plan
from selcon_plugin.samplers.cluster import ClusterSampler
from selcon_plugin.samplers.planners import (
    planner_named,
    planner_names,
    register_planner,
)


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
