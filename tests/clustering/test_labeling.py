from __future__ import annotations

import logging
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from torch import Tensor

from selcon_plugin.clustering import (
    DBSCANLabeler,
    Labeler,
    PseudoLabels,
    label_images,
    nearest_by_distance,
)


class Fixed(Labeler):
    """Labeler that returns given labels."""

    def __init__(self, labels: list[int], *, eps: float = 0.5) -> None:
        self.labels = labels

    def cluster(self, features: Tensor) -> PseudoLabels:
        return PseudoLabels.numbered(self.labels)


def blobs(num_clusters: int, size: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(num_clusters, 16, generator=generator)
    noise = 0.2 * torch.randn(num_clusters * size, 16, generator=generator)
    return F.normalize(centers.repeat_interleave(size, dim=0) + noise, dim=1)


def test_clusters_pass_through() -> None:
    found = label_images(DBSCANLabeler(k1=8, k2=2), blobs(5, 8), None, min_clusters=4)
    assert found.num_clusters == 5
    assert not found.instance_level
    assert "stability" not in found.measured


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([-1, -1, -1, -1], r"No cluster was found \(100 % of 4 .* raise eps"),
        ([0, 0, 0, 0], r"One cluster was found \(0 % of 4 .* lower eps"),
        ([0, 0, 1, 1], r"2 clusters were found .* needs 3.* lower the batch size"),
        ([0, 0, -1, -1], "One cluster was found"),
    ],
)
def test_too_few_clusters_give_instance_level_labels(
    labels: list[int], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    found = label_images(Fixed(labels), blobs(1, 4), None, min_clusters=3)
    assert found.instance_level
    assert found.labels.tolist() == [0, 1, 2, 3]
    # The report describes the clusters that were found, not the fallback.
    assert found.measured["num_clusters"] == len(set(labels) - {-1})
    assert len(caplog.records) == 1
    assert re.search(words, caplog.text)


def test_one_cluster_is_too_few_whatever_the_batch() -> None:
    """A contrastive loss needs a second cluster."""
    assert label_images(Fixed([0, 0]), blobs(1, 2), None, min_clusters=1).instance_level


@pytest.mark.parametrize("features", [blobs(1, 1), blobs(1, 2), torch.ones(30, 4)])
def test_impossible_sets_do_not_fail(features: Tensor) -> None:
    found = label_images(DBSCANLabeler(), features, None)
    assert found.instance_level
    assert found.num_images == len(features)


def test_stability_against_the_round_before() -> None:
    labels = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    same = torch.tensor([5, 5, 5, 9, 9, 9, 7, 7, 7])
    other = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])
    features = blobs(3, 3)
    unchanged = label_images(Fixed(labels), features, None, previous=same)
    changed = label_images(Fixed(labels), features, None, previous=other)
    assert unchanged.measured["stability"] == pytest.approx(1.0)
    assert changed.measured["stability"] < 0.1


def nearest_in_loops(dense: np.ndarray, stored: np.ndarray, count: int) -> Any:
    index, distance = [], []
    for i, row in enumerate(dense):
        others = [j for j in range(len(row)) if stored[i, j] and j != i]
        others.sort(key=lambda j: (row[j], j))
        others = others[:count]
        missing = count - len(others)
        index.append(others + [i] * missing)
        distance.append([row[j] for j in others] + [1.0] * missing)
    return index, distance


@pytest.mark.parametrize("count", [1, 3, 9])
def test_nearest_by_distance_is_the_sorted_list(count: int) -> None:
    rng = np.random.default_rng(count)
    dense = rng.integers(1, 6, (12, 12)) / 8  # ties
    stored = rng.random((12, 12)) < 0.4
    stored[3] = False
    np.fill_diagonal(stored, True)
    graph = csr_array(np.where(stored, dense, 0.0).astype(np.float32))
    labels = PseudoLabels(torch.zeros(12, dtype=torch.int64), distance=graph)
    index, distance = nearest_by_distance(labels, count)
    wanted_index, wanted_distance = nearest_in_loops(dense, stored, count)
    assert index.tolist() == wanted_index
    assert torch.allclose(distance, torch.tensor(wanted_distance, dtype=torch.float32))


def test_nearest_needs_distances() -> None:
    with pytest.raises(ValueError, match=r"no distances.*DBSCAN"):
        nearest_by_distance(PseudoLabels.numbered([0, 0]), 1)
