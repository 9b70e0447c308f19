"""Choice of the batch sampler, and micro-batches."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from selcon_plugin.engine.batches import build_sampler, split_batch
from selcon_plugin.samplers.cluster import STREAM_SAMPLER, ClusterSampler
from selcon_plugin.samplers.planners import planner_names
from selcon_plugin.samplers.stream import StreamSampler

# --- cutting a batch ---------------------------------------------------------------------


def batch_of(size: int) -> dict[str, Any]:
    return {
        "images": torch.randn(size, 3, 6, 6),
        "targets": torch.arange(size),
        "camids": torch.arange(size) % 2,
        "img_paths": [f"{place}.jpg" for place in range(size)],
    }


def test_micro_batches_are_contiguous_views() -> None:
    batch = batch_of(8)
    parts = split_batch(batch, 4)
    assert [part["targets"].tolist() for part in parts] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [part["img_paths"] for part in parts[:2]] == [
        ["0.jpg", "1.jpg"],
        ["2.jpg", "3.jpg"],
    ]
    for part in parts:
        assert part.keys() == batch.keys()
        storage = part["images"].untyped_storage()
        assert storage.data_ptr() == batch["images"].untyped_storage().data_ptr()
    assert torch.equal(torch.cat([part["images"] for part in parts]), batch["images"])


def test_one_micro_batch_is_the_batch() -> None:
    batch = {**batch_of(8), "note": 3}  # nothing is asked of a batch left whole
    assert split_batch(batch, 1)[0] is batch


@pytest.mark.parametrize(("size", "parts"), [(8, 3), (6, 4), (2, 4)])
def test_batch_that_cannot_be_cut_names_both_sizes(size: int, parts: int) -> None:
    with pytest.raises(ValueError, match=f"{size} images .* {parts} micro-batches"):
        split_batch(batch_of(size), parts)


def test_entries_of_unequal_length_are_refused() -> None:
    batch = batch_of(8)
    batch["img_paths"].pop()
    with pytest.raises(ValueError, match="'img_paths': 7"):
        split_batch(batch, 2)


# --- drawing batches ---------------------------------------------------------------------


def drawn(sampler: Any, count: int) -> list[int]:
    return [key.index for key in itertools.islice(sampler, count)]


def test_stream_is_that_of_the_seed() -> None:
    sampler = build_sampler(STREAM_SAMPLER, 20, batch_size=4, seed=7)
    assert isinstance(sampler, StreamSampler)
    assert drawn(sampler, 40) == drawn(StreamSampler(20, batch_size=4, seed=7), 40)
    assert sorted(drawn(sampler, 20)) == list(range(20))


@pytest.mark.parametrize("name", planner_names())
def test_cluster_sampler_of_every_planner(name: str) -> None:
    settings = {"batch_size": 8, "num_instances": 2, "outlier_ratio": 0.25, "seed": 3}
    sampler = build_sampler(name, 24, **settings)
    assert isinstance(sampler, ClusterSampler)
    expected = ClusterSampler(planner=name, **settings)
    labels = torch.arange(24) // 3
    labels[20:] = -1
    for one in (sampler, expected):
        one.set_labels(labels, torch.arange(24) % 2, start_batch=0)
    assert drawn(sampler, 32) == drawn(expected, 32)


def test_ranks_share_a_batch() -> None:
    whole = drawn(build_sampler(STREAM_SAMPLER, 20, batch_size=8), 8)
    halves = [
        build_sampler(STREAM_SAMPLER, 20, batch_size=8, rank=rank, world_size=2)
        for rank in (0, 1)
    ]
    assert drawn(halves[0], 4) + drawn(halves[1], 4) == whole


@pytest.mark.parametrize(
    ("name", "num_images", "changes", "words"),
    [
        ("stream", 7, {}, r"7 training images do not fill one batch: .*\(8\) or add"),
        ("stream", 40, {"micro_batches": 3}, r"\(8, .*micro-batches \(3\) x processes"),
        ("stream", 40, {"world_size": 3}, r"\(8, .*\(1\) x processes \(3\)"),
        (
            "pk",
            40,
            {"num_instances": 3},
            r"\(8\) must be a multiple of images per cluster \(3\)",
        ),
        (
            "pk",
            40,
            {"num_instances": 4, "micro_batches": 4},
            r"images per cluster \(4\) x micro-batches \(4\) x processes \(1\)",
        ),
        ("pk", 40, {"num_instances": 2, "world_size": 8}, r"\(2\) x .* x processes \(8\)"),
        ("fastest", 40, {}, r"unknown planner 'fastest'; known .*pk_camera"),
    ],
)
def test_what_does_not_fit_is_named(
    name: str, num_images: int, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        build_sampler(name, num_images, batch_size=8, **changes)


def test_images_of_a_cluster_are_no_matter_to_the_stream() -> None:
    build_sampler(STREAM_SAMPLER, 40, batch_size=8, num_instances=3, micro_batches=4)
