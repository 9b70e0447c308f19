"""Properties of all samplers for any labels: resuming, ranks, one image, outliers."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from selcon_plugin.samplers.cluster import ClusterSampler
from selcon_plugin.samplers.planners import planner_names
from selcon_plugin.samplers.stream import BatchStream, StreamSampler

seeds = st.integers(0, 2**31)


def keys(sampler: BatchStream, count: int) -> list[tuple[int, int]]:
    return [(key.index, key.position) for key in itertools.islice(sampler, count)]


def batches(sampler: BatchStream, start: int, count: int) -> Any:
    return np.stack(list(itertools.islice(sampler.batches(start), count)))


def dealt(build: Any, num_batches: int, start: int, world_size: int) -> list:
    """Sample on every rank and concatenate the slices of each batch by rank."""
    shares = []
    for rank in range(world_size):
        sampler = build(rank, world_size)
        sampler.start = start
        share = sampler.batch_size // world_size
        drawn = keys(sampler, num_batches * share)
        shares.append([drawn[i : i + share] for i in range(0, len(drawn), share)])
    return [key for parts in zip(*shares, strict=True) for part in parts for key in part]


@given(
    num_images=st.integers(1, 20),
    share=st.integers(1, 4),
    world_size=st.integers(1, 4),
    start=st.integers(0, 15),
    seed=seeds,
)
def test_stream_is_permutations_for_any_rank_and_start(
    num_images: int, share: int, world_size: int, start: int, seed: int
) -> None:
    batch_size = share * world_size

    def build(rank: int, world_size: int) -> StreamSampler:
        settings = {"seed": seed, "rank": rank, "world_size": world_size}
        return StreamSampler(num_images, batch_size=batch_size, **settings)

    count = (start + 4) * batch_size
    whole = keys(build(0, 1), count + num_images)
    for first in range(0, count, num_images):
        indices = [index for index, _ in whole[first : first + num_images]]
        assert sorted(indices) == list(range(num_images))
    assert [position for _, position in whole] == list(range(len(whole)))
    assert dealt(build, 4, start, world_size) == whole[start * batch_size : count]


@st.composite
def cluster_settings(draw: Any) -> dict[str, Any]:
    num_instances, blocks = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    world_size = draw(st.sampled_from([1, 2, 3]))
    outliers = draw(st.sampled_from([0.0, 0.25, 0.5])) if blocks * world_size > 1 else 0.0
    labels = draw(st.lists(st.integers(-2, 5), min_size=1, max_size=25))
    camera = st.integers(-1, 3)
    size = {"min_size": len(labels), "max_size": len(labels)}
    return {
        "labels": np.maximum(labels, -1),
        "camids": draw(st.none() | st.lists(camera, **size).map(np.array)),
        "start_batch": draw(st.integers(0, 7)),
        "world_size": world_size,
        "settings": {
            "batch_size": num_instances * blocks * world_size,
            "planner": draw(st.sampled_from(planner_names())),
            "num_instances": num_instances,
            "group_size": draw(st.integers(1, 6)),
            "outlier_ratio": outliers,
            "seed": draw(seeds),
        },
    }


def sampler_of(case: dict[str, Any], rank: int = 0, world_size: int = 1) -> ClusterSampler:
    sampler = ClusterSampler(**case["settings"], rank=rank, world_size=world_size)
    sampler.set_labels(case["labels"], case["camids"], case["start_batch"])
    return sampler


def can_be_sampled(case: dict[str, Any]) -> bool:
    return case["settings"]["planner"] == "shuffle" or bool((case["labels"] >= 0).any())


@given(cluster_settings(), st.integers(0, 5))
def test_cluster_batches_are_the_same_for_any_rank_and_start(
    case: dict[str, Any], later: int
) -> None:
    assume(can_be_sampled(case))
    start, batch_size = case["start_batch"], case["settings"]["batch_size"]
    whole = keys(sampler_of(case), (later + 3) * batch_size)
    assert [position for _, position in whole] == list(
        range(start * batch_size, (start + later + 3) * batch_size)
    )

    def build(rank: int, world_size: int) -> ClusterSampler:
        return sampler_of(case, rank, world_size)

    parts = dealt(build, 3, start + later, case["world_size"])
    assert parts == whole[later * batch_size :]


@given(cluster_settings())
def test_batches_follow_the_planner(case: dict[str, Any]) -> None:
    assume(can_be_sampled(case))
    labels, settings = case["labels"], case["settings"]
    sampler = sampler_of(case)
    drawn = batches(sampler, case["start_batch"], 8)
    assert drawn.shape == (8, settings["batch_size"])
    assert ((drawn >= 0) & (drawn < len(labels))).all()
    of_batch = labels[drawn]
    has_both = (labels < 0).any() and (labels >= 0).any()
    quota = sampler.outliers_per_batch if has_both else 0
    if quota:
        assert ((of_batch < 0).sum(axis=1) == quota).all()
    elif settings["planner"] != "shuffle":
        assert (of_batch >= 0).all()
    if settings["planner"] in ("pk", "pk_camera", "proxy"):
        blocks = of_batch.reshape(-1, settings["num_instances"])
        clustered = blocks[(blocks >= 0).all(axis=1)]
        assert (clustered == clustered[:, :1]).all()
        assert len(clustered) == len(blocks) - 8 * quota // settings["num_instances"]


@given(cluster_settings())
def test_a_pass_shows_every_cluster(case: dict[str, Any]) -> None:
    assume((case["labels"] >= 0).any())
    settings = case["settings"] | {"outlier_ratio": 0.0}
    sampler = sampler_of(case | {"settings": settings})
    # A pass has at most K images per image, and the images that fill the last batch.
    count = -(-len(case["labels"]) * settings["num_instances"] // settings["batch_size"])
    drawn = batches(sampler, case["start_batch"], count)
    seen = set(case["labels"][drawn].ravel().tolist())
    assert seen - {-1} == set(case["labels"].tolist()) - {-1}


@given(cluster_settings())
def test_nothing_but_outliers_is_refused_by_planners_of_clusters(
    case: dict[str, Any],
) -> None:
    case = case | {"labels": np.full(len(case["labels"]), -1)}
    if case["settings"]["planner"] == "shuffle":
        assert len(batches(sampler_of(case), case["start_batch"], 2)) == 2
        return
    with pytest.raises(ValueError, match="outliers"):
        sampler_of(case)
