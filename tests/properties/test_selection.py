"""Properties of all selections: sizes from 0, one image, duplicates and ties."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from selcon_plugin.selection import (
    clamp_counts,
    draw_members,
    draw_random_negatives,
    prefer_listed,
    select_neighbors,
    select_within_clusters,
    step_generator,
)

counts = st.integers(0, 14)


@st.composite
def distances(draw: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Generate distances of 0 to 5 images to 1 to 12 rows, own rows, and clusters."""
    num_rows, count = draw(st.integers(1, 12)), draw(st.integers(0, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    distance = torch.rand(count, num_rows, generator=generator) * 4
    if draw(st.booleans()):  # many are equal, as among duplicates
        distance = distance.round()
    index = torch.randint(num_rows, (count,), generator=generator)
    labels = torch.randint(-1, draw(st.integers(0, 4)), (num_rows,), generator=generator)
    return distance, index, labels


@given(st.integers(0, 20), counts, counts)
def test_counts_that_fit_are_kept_and_others_are_the_largest(
    num_images: int, num_neighbors: int, num_negatives: int
) -> None:
    neighbors, negatives = clamp_counts(num_images, num_neighbors, num_negatives)
    others = max(num_images - 1, 0)
    assert neighbors == min(num_neighbors, others)
    assert negatives == min(num_negatives, others - neighbors)


@given(distances(), counts, counts)
def test_neighbors_are_the_nearest_and_negatives_the_next(
    case: tuple[Tensor, Tensor, Tensor], num_neighbors: int, num_negatives: int
) -> None:
    distance, index, _ = case
    before = distance.clone()
    positives, negatives = select_neighbors(
        distance, index, num_neighbors=num_neighbors, num_negatives=num_negatives
    )
    assert torch.equal(distance, before)
    sizes = clamp_counts(distance.shape[1], num_neighbors, num_negatives)
    assert (positives.shape[1] - 1, negatives.shape[1]) == sizes
    assert torch.equal(positives[:, 0], index)
    for row, own in enumerate(index.tolist()):
        chosen = [*positives[row].tolist(), *negatives[row].tolist()]
        assert len(set(chosen)) == len(chosen)
        ranked = distance[row, chosen[1:]].tolist()
        assert ranked == sorted(ranked)
        left = [d for j, d in enumerate(distance[row].tolist()) if j not in chosen]
        assert all(d >= ranked[-1] for d in left if ranked)
        assert chosen[0] == own


@given(distances(), counts, counts)
def test_selection_within_clusters_is_its_definition(
    case: tuple[Tensor, Tensor, Tensor], num_neighbors: int, num_negatives: int
) -> None:
    distance, index, labels = case
    found = select_within_clusters(
        distance, index, labels, num_neighbors=num_neighbors, num_negatives=num_negatives
    )
    neighbors, negatives = clamp_counts(len(labels), num_neighbors, num_negatives)
    assert found.positive_mask is not None
    assert found.negative_mask is not None
    for row, own in enumerate(index.tolist()):
        same = [
            j
            for j in range(len(labels))
            if j != own and labels[j] == labels[own] and labels[own] >= 0
        ]
        other = [j for j in range(len(labels)) if j != own and j not in same]
        near = sorted(distance[row, same].tolist())[:neighbors]
        skipped = neighbors if labels[own] < 0 else 0
        far = sorted(distance[row, other].tolist())[skipped : skipped + negatives]
        positives = found.positive_index[row][found.positive_mask[row]].tolist()
        chosen = found.negative_index[row][found.negative_mask[row]].tolist()
        assert positives[0] == own
        assert set(positives[1:]) <= set(same)
        assert set(chosen) <= set(other)
        assert len({*positives, *chosen}) == len(positives) + len(chosen)
        assert distance[row, positives[1:]].tolist() == near
        assert distance[row, chosen].tolist() == far


@given(distances(), counts, st.integers(0, 99))
def test_listed_rows_come_first(
    case: tuple[Tensor, Tensor, Tensor], num_listed: int, seed: int
) -> None:
    distance, _, _ = case
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(distance.shape, generator=generator).argsort(dim=1)
    listed = order[:, :num_listed]
    listed_distance = torch.rand(listed.shape, generator=generator)
    found = prefer_listed(distance, listed, listed_distance)
    assert torch.equal(found.gather(1, listed), listed_distance)
    others = order[:, num_listed:]
    assert torch.equal(found.gather(1, others), distance.gather(1, others) + 5.0)


@given(st.integers(1, 12), counts, counts, st.integers(0, 2**20))
def test_random_negatives_are_distinct_and_never_the_own_row(
    num_images: int, num_negatives: int, batch_size: int, seed: int
) -> None:
    generator = step_generator(seed, 0)
    index = torch.randint(num_images, (batch_size,), generator=generator)
    options = {"num_images": num_images, "num_negatives": num_negatives}
    drawn = draw_random_negatives(index, **options, generator=step_generator(seed, 1))
    assert drawn.shape == (batch_size, min(num_negatives, num_images - 1))
    for own, rows in zip(index.tolist(), drawn.tolist(), strict=True):
        assert own not in rows
        assert len(set(rows)) == len(rows)
        assert set(rows) <= set(range(num_images))
    # A rank's part of the batch samples the same rows as the whole batch.
    part = draw_random_negatives(index[1:], **options, generator=step_generator(seed, 1))
    assert torch.equal(part, drawn[1:])


@given(st.lists(st.integers(-1, 4), max_size=16), st.integers(1, 6), st.integers(0, 99))
def test_sampled_members_are_of_their_cluster_and_as_different_as_possible(
    names: list[int], count: int, seed: int
) -> None:
    labels = torch.tensor(names, dtype=torch.int64)
    clusters, positions = draw_members(labels, count, generator=step_generator(seed, 0))
    assert clusters.tolist() == sorted(set(names) - {-1})
    assert positions.shape == (len(clusters), count)
    for cluster, members in zip(clusters.tolist(), positions.tolist(), strict=True):
        assert {names[place] for place in members} == {cluster}
        assert len(set(members)) == min(count, names.count(cluster))
