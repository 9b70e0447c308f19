from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from selcon_plugin.selection import (
    _warn_clamped,
    clamp_counts,
    draw_members,
    draw_random_negatives,
    prefer_listed,
    select_neighbors,
    select_within_clusters,
    step_generator,
)


def selection_by_loops(
    distance: Tensor, index: Tensor, num_neighbors: int, num_negatives: int
) -> tuple[list[list[int]], list[list[int]]]:
    positives, negatives = [], []
    for row, own in zip(distance.tolist(), index.tolist(), strict=True):
        others = sorted((d, j) for j, d in enumerate(row) if j != own)
        ranked = [j for _, j in others]
        positives.append([own, *ranked[:num_neighbors]])
        negatives.append(ranked[num_neighbors : num_neighbors + num_negatives])
    return positives, negatives


@pytest.mark.parametrize(
    ("neighbors", "negatives"), [(3, 5), (0, 4), (7, 1), (2, 0), (9, 10)]
)
def test_equals_definition_by_loops(neighbors: int, negatives: int) -> None:
    generator = torch.Generator().manual_seed(0)
    distance = torch.rand(6, 20, generator=generator)
    index = torch.tensor([4, 0, 19, 4, 7, 11])  # a row occurs twice in the batch
    before = distance.clone()
    found = select_neighbors(
        distance, index, num_neighbors=neighbors, num_negatives=negatives
    )
    expected = selection_by_loops(distance, index, neighbors, negatives)
    assert (found[0].tolist(), found[1].tolist()) == expected
    assert torch.equal(distance, before)


def test_own_row_is_column_0_and_nowhere_else_even_when_farthest() -> None:
    distance = torch.zeros(3, 8)
    index = torch.tensor([1, 5, 7])
    distance[torch.arange(3), index] = 100.0
    positives, negatives = select_neighbors(
        distance, index, num_neighbors=3, num_negatives=4
    )
    assert torch.equal(positives[:, 0], index)
    rest = torch.cat([positives[:, 1:], negatives], dim=1)
    assert not (rest == index[:, None]).any()


def test_duplicate_images_are_neighbors_of_each_other() -> None:
    # Rows 0 and 1 are the same image: equal distances to everything, zero to each other.
    distance = torch.tensor([[0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 1.0, 2.0]])
    index = torch.tensor([0, 1])
    positives, negatives = select_neighbors(
        distance, index, num_neighbors=1, num_negatives=2
    )
    assert positives.tolist() == [[0, 1], [1, 0]]
    assert negatives.tolist() == [[2, 3], [2, 3]]


def test_all_equal_distances_still_give_distinct_rows() -> None:
    index = torch.arange(10)
    positives, negatives = select_neighbors(
        torch.ones(10, 10), index, num_neighbors=4, num_negatives=5
    )
    everything = torch.cat([positives, negatives], dim=1).sort(dim=1).values
    assert torch.equal(everything, index.expand(10, -1))


@pytest.mark.parametrize(
    ("num_images", "asked", "used"),
    [
        (1, (7, 500), (0, 0)),
        (5, (7, 500), (4, 0)),
        (40, (7, 500), (7, 32)),
        (508, (7, 500), (7, 500)),
        (3, (0, 2), (0, 2)),
    ],
)
def test_small_bank_clamps_neighbors_then_negatives(
    num_images: int, asked: tuple[int, int], used: tuple[int, int]
) -> None:
    assert clamp_counts(num_images, *asked) == used
    positives, negatives = select_neighbors(
        torch.rand(2, num_images),
        torch.tensor([0, num_images - 1]),
        num_neighbors=asked[0],
        num_negatives=asked[1],
    )
    assert positives.shape == (2, 1 + used[0])
    assert negatives.shape == (2, used[1])


def test_clamping_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    _warn_clamped.cache_clear()
    with caplog.at_level(logging.WARNING, logger="selcon_plugin.selection"):
        for _ in range(3):
            clamp_counts(40, 7, 500)
        clamp_counts(1000, 7, 500)
    assert len(caplog.records) == 1
    text = caplog.records[0].getMessage()
    for part in ("40", "7", "32", "500", "NUM_NEIGHBORS", "NUM_NEGATIVES"):
        assert part in text


def draw(index: list[int], num_images: int, num_negatives: int, seed: int = 0) -> Tensor:
    return draw_random_negatives(
        torch.tensor(index),
        num_images=num_images,
        num_negatives=num_negatives,
        generator=torch.Generator().manual_seed(seed),
    )


@pytest.mark.parametrize("num_negatives", [1, 7, 18, 19, 50])
def test_random_negatives_are_distinct_and_never_the_own_row(num_negatives: int) -> None:
    index = list(range(20))
    for seed in range(20):
        drawn = draw(index, 20, num_negatives, seed)
        assert drawn.shape == (20, min(num_negatives, 19))
        assert ((drawn >= 0) & (drawn < 20)).all()
        for own, row in zip(index, drawn.tolist(), strict=True):
            assert own not in row
            assert len(set(row)) == len(row)


def test_random_negatives_depend_on_the_seed_and_not_on_the_batch() -> None:
    single = [draw([own], 50, 12) for own in range(50)]
    together = draw(list(range(50)), 50, 12)
    assert torch.equal(torch.cat(single), together)
    assert torch.equal(draw([3, 3, 9], 50, 12), together[[3, 3, 9]])
    assert not torch.equal(draw([3], 50, 12, seed=1), single[3])


def test_random_negatives_are_uniform() -> None:
    num_images, num_negatives, draws, own = 20, 5, 4000, 3
    counts = torch.zeros(num_images)
    for seed in range(draws):
        counts[draw([own], num_images, num_negatives, seed)[0]] += 1
    assert counts[own] == 0
    others = counts[torch.arange(num_images) != own]
    expected = draws * num_negatives / (num_images - 1)
    chi_square = ((others - expected) ** 2 / expected).sum().item()
    # 18 degrees of freedom: 42.3 is exceeded with probability 0.001 (less here, since a
    # sample without replacement varies less); far too uniform would be as wrong.
    assert 3.0 < chi_square < 42.3


def test_random_negatives_of_a_single_image_are_none() -> None:
    assert draw([0, 0], 1, 5).shape == (2, 0)


# --- clusters and listed neighbors ---


def clusters_by_loops(
    distance: Tensor, index: Tensor, labels: list[int], neighbors: int, negatives: int
) -> tuple[list[list[int]], list[list[int]]]:
    chosen_positives, chosen_negatives = [], []
    for row, own in zip(distance.tolist(), index.tolist(), strict=True):
        ranked = [j for _, j in sorted((d, j) for j, d in enumerate(row) if j != own)]
        if labels[own] < 0:
            inside, outside = [], ranked[neighbors:]
        else:
            inside = [j for j in ranked if labels[j] == labels[own]]
            outside = [j for j in ranked if labels[j] != labels[own]]
        chosen_positives.append([own, *inside[:neighbors]])
        chosen_negatives.append(outside[:negatives])
    return chosen_positives, chosen_negatives


@pytest.mark.parametrize(("neighbors", "negatives"), [(3, 5), (0, 4), (7, 12), (2, 0)])
def test_clusters_equal_the_definition_by_loops(neighbors: int, negatives: int) -> None:
    generator = torch.Generator().manual_seed(neighbors)
    distance = torch.rand(7, 20, generator=generator)
    # A cluster of 2, of 9, of 1, and outliers.
    labels = [0, 0] + [1] * 9 + [2] + [-1] * 8
    index = torch.tensor([0, 1, 4, 11, 15, 19, 4])
    chosen = select_within_clusters(
        distance,
        index,
        torch.tensor(labels),
        num_neighbors=neighbors,
        num_negatives=negatives,
    )
    assert chosen.positive_mask is not None
    assert chosen.negative_mask is not None
    pairs = (
        (chosen.positive_index, chosen.positive_mask),
        (chosen.negative_index, chosen.negative_mask),
    )
    found = tuple(
        [row[kept].tolist() for row, kept in zip(rows, mask, strict=True)]
        for rows, mask in pairs
    )
    assert found == clusters_by_loops(distance, index, labels, neighbors, negatives)


def test_one_cluster_of_all_leaves_no_negative() -> None:
    chosen = select_within_clusters(
        torch.rand(2, 6),
        torch.tensor([0, 3]),
        torch.zeros(6, dtype=torch.int64),
        num_neighbors=2,
        num_negatives=3,
    )
    assert chosen.negative_mask is not None
    assert not chosen.negative_mask.any()


def test_listed_rows_come_first_by_their_own_distance() -> None:
    distance = torch.tensor([[0.0, 0.1, 4.0, 0.3, 3.9]])
    ranked = prefer_listed(
        distance, torch.tensor([[4, 2, 0]]), torch.tensor([[0.2, 0.9, 1.0]])
    )
    positives, negatives = select_neighbors(
        ranked, torch.tensor([0]), num_neighbors=3, num_negatives=1
    )
    # 4 and 2 are listed; then the nearest others follow. The own row, listed as padding,
    # is excluded.
    assert positives.tolist() == [[0, 4, 2, 1]]
    assert negatives.tolist() == [[3]]
    assert distance[0, 4] == pytest.approx(3.9)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_sampled_members_are_distinct_and_of_their_cluster(count: int, device: str) -> None:
    labels = torch.tensor([7, -1, 2, 7, 7, 2, -1, 5])
    clusters, positions = draw_members(
        labels.to(device), count, generator=step_generator(0, 3)
    )
    assert clusters.tolist() == [2, 5, 7]
    assert positions.shape == (3, count)
    for cluster, drawn in zip(clusters.tolist(), positions.tolist(), strict=True):
        members = set((labels == cluster).nonzero().flatten().tolist())
        assert set(drawn) <= members
        assert len(set(drawn)) == min(count, len(members))


def test_every_member_is_sampled_once_before_any_repeats() -> None:
    labels = torch.tensor([0, 1, 0, 0, 1])
    counts = torch.zeros(5, dtype=torch.int64)
    for step in range(600):
        _, drawn = draw_members(labels, 1, generator=step_generator(1, step))
        counts[drawn] += 1
    assert counts.tolist() == pytest.approx([200, 300, 200, 200, 300], abs=50)


def test_samples_do_not_depend_on_the_cluster_numbers() -> None:
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 2, 0])
    renamed = torch.tensor([2, 0, 1])[labels]
    _, first = draw_members(labels, 4, generator=step_generator(0, 5))
    _, second = draw_members(renamed, 4, generator=step_generator(0, 5))
    assert torch.equal(first[[1, 2, 0]], second)


def test_without_clusters_no_image_is_sampled() -> None:
    clusters, positions = draw_members(
        torch.tensor([-1, -1]), 3, generator=step_generator(0, 0)
    )
    assert len(clusters) == 0
    assert positions.shape == (0, 3)
