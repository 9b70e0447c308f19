from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score

from selcon_plugin.metrics.identities import cluster_diagnostics, neighbor_precision


def test_neighbor_precision_by_hand() -> None:
    pids = torch.tensor([5, 5, 6, -1, -1])
    neighbors = torch.tensor([[1, 2], [0, 3], [4, 0]])
    # Image 3 is of unknown identity: its neighbor 4 is not a match.
    assert neighbor_precision(torch.tensor([0, 1, 3]), neighbors, pids) == pytest.approx(
        2 / 6
    )


@pytest.mark.parametrize("seed", range(5))
def test_cluster_diagnostics_equal_loops(seed: int, device: str) -> None:
    rng = np.random.default_rng(seed)
    pids = rng.integers(-1, 8, 60)
    labels = np.where(rng.random(60) < 0.6, np.maximum(pids, 0), rng.integers(-1, 8, 60))
    known = [i for i in range(60) if pids[i] >= 0]
    together = same = both = 0
    for i, j in itertools.combinations(known, 2):
        in_one = labels[i] == labels[j] and labels[i] >= 0
        together += in_one
        same += pids[i] == pids[j]
        both += in_one and pids[i] == pids[j]
    clustered = [i for i in known if labels[i] >= 0]
    most_frequent = 0
    for label in {labels[i] for i in clustered}:
        members = [pids[i] for i in clustered if labels[i] == label]
        most_frequent += max(members.count(pid) for pid in members)
    singletons = [labels[i] if labels[i] >= 0 else 100 + i for i in known]
    found = cluster_diagnostics(
        torch.from_numpy(labels).to(device), torch.from_numpy(pids).to(device)
    )
    assert found == {
        "purity": pytest.approx(most_frequent / len(clustered)),
        "ami": pytest.approx(adjusted_mutual_info_score(pids[known], singletons)),
        "pair_precision": pytest.approx(both / together),
        "pair_recall": pytest.approx(both / same),
    }


def test_perfect_clusters_and_one_giant_cluster() -> None:
    pids = torch.tensor([4, 4, 4, 7, 7, -1])
    perfect = cluster_diagnostics(torch.tensor([1, 1, 1, 0, 0, 0]), pids)
    assert perfect == dict.fromkeys(("purity", "ami", "pair_precision", "pair_recall"), 1)
    giant = cluster_diagnostics(torch.zeros(6, dtype=torch.int64), pids)
    assert giant["purity"] == pytest.approx(3 / 5)
    assert giant["ami"] == pytest.approx(0, abs=1e-12)
    assert giant["pair_precision"] == pytest.approx(4 / 10)
    assert giant["pair_recall"] == 1


def test_nothing_to_compare() -> None:
    all_outliers = cluster_diagnostics(torch.full((4,), -1), torch.tensor([0, 0, 1, 1]))
    assert all_outliers["pair_recall"] == 0
    assert all_outliers["ami"] == pytest.approx(0, abs=1e-12)
    assert math.isnan(all_outliers["purity"])
    assert math.isnan(all_outliers["pair_precision"])
    unknown = cluster_diagnostics(torch.tensor([0, 0]), torch.tensor([-1, -1]))
    assert all(math.isnan(value) for value in unknown.values())
    with pytest.raises(ValueError, match=r"same images, got shapes \(2,\) and \(1,\)"):
        cluster_diagnostics(torch.tensor([0, 0]), torch.tensor([0]))
