"""Collapse metrics: by definition, by hand, and the warnings."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from selcon_plugin.clustering import PseudoLabels
from selcon_plugin.metrics import collapse
from selcon_plugin.metrics.collapse import (
    find_collapse_signs,
    measure_clusters,
    measure_spread,
)


def features(count: int, dim: int, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(count + dim)
    return (torch.randn(count, dim, generator=generator) + 0.3).to(device)


def by_definition(raw: torch.Tensor) -> dict[str, float]:
    unit = raw.cpu().double().numpy()
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    mean = unit.mean(axis=0)
    values = np.linalg.svd(unit - mean, compute_uv=False) ** 2
    weights = [value / values.sum() for value in values if value > 1e-12]
    nearest = [
        max(float(a @ b) for j, b in enumerate(unit) if j != i) for i, a in enumerate(unit)
    ]
    return {
        "embedding_variance": float(np.mean(((unit - mean) ** 2).sum(axis=1))),
        "effective_rank": math.exp(-sum(weight * math.log(weight) for weight in weights)),
        "nearest_similarity": sum(nearest) / len(nearest),
    }


@pytest.mark.parametrize(("count", "dim"), [(30, 5), (5, 30), (2, 3), (12, 12)])
def test_spread_is_as_defined(
    count: int, dim: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collapse, "_ROWS_AT_ONCE", 7)
    raw = features(count, dim, device)
    assert measure_spread(raw) == pytest.approx(by_definition(raw), abs=1e-4)


def test_sample_of_many_is_spread_over_the_list_and_sees_all_neighbors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(collapse, "_SAMPLE", 4)
    first, second = features(4, 6), features(8, 6)
    # Of 12 images 0, 3, 6 and 9 are sampled. The duplicate of each is next to it.
    rows = torch.stack([first, first, second[::2]], dim=1).flatten(0, 1)
    found = measure_spread(rows)
    assert found["nearest_similarity"] == pytest.approx(1.0, abs=1e-5)
    assert found["effective_rank"] == pytest.approx(
        by_definition(first)["effective_rank"], abs=1e-4
    )
    assert found["embedding_variance"] == pytest.approx(
        by_definition(rows)["embedding_variance"], abs=1e-5
    )


def test_spread_of_equal_and_of_half_precision_features() -> None:
    equal = measure_spread(torch.ones(50, 8))
    assert equal["embedding_variance"] == pytest.approx(0.0, abs=1e-6)
    assert equal["nearest_similarity"] == pytest.approx(1.0, abs=1e-6)
    assert all(math.isfinite(value) for value in equal.values())
    raw = features(40, 8)
    assert measure_spread(raw.half()) == pytest.approx(measure_spread(raw), rel=2e-2)


def test_rank_counts_directions() -> None:
    """k equally strong directions have effective rank k."""
    for k in (1, 3, 8):
        axes = torch.eye(10)[:k]
        assert measure_spread(torch.cat([axes, -axes]))["effective_rank"] == pytest.approx(
            k, rel=1e-4
        )


def test_spread_needs_two_images() -> None:
    with pytest.raises(
        ValueError, match=r"shape \(M, C\) with 2 images or more, got shape \(1, 4\)"
    ):
        measure_spread(torch.ones(1, 4))


def test_ratio_of_the_largest_cluster() -> None:
    found = PseudoLabels.numbered([0, 0, 0, 1, -1])
    assert measure_clusters(found) == {"largest_cluster_ratio": 0.6}
    for none in (PseudoLabels.numbered([-1, -1]), PseudoLabels.each_its_own(3)):
        assert measure_clusters(none) == {"largest_cluster_ratio": 0.0}
    # A single cluster of all images is not trained on, but reported.
    fallen_back = PseudoLabels.each_its_own(4, measured={"max_cluster_size": 3.0})
    assert measure_clusters(fallen_back) == {"largest_cluster_ratio": 0.75}


# Metrics of finished runs on SyntheticPersons (1,000 images), the extremes of each.
HEALTHY = [
    {"embedding_variance": 0.895, "effective_rank": 195.0, "largest_cluster_ratio": 0.142},
    {"embedding_variance": 0.999, "effective_rank": 92.0, "largest_cluster_ratio": 0.0},
    {"embedding_variance": 0.938, "effective_rank": 278.0, "largest_cluster_ratio": 0.207},
]


@pytest.mark.parametrize("measured", HEALTHY)
def test_healthy_runs_cause_no_warning(measured: dict[str, float]) -> None:
    assert not find_collapse_signs(measured, 1000)


def test_signs_describe_the_collapse() -> None:
    torch.manual_seed(0)
    point = F.normalize(torch.ones(100, 16) + 0.01 * torch.randn(100, 16), dim=1)
    signs = find_collapse_signs(measure_spread(point), 100)
    assert re.search(r"nearly the same feature \(variance .*e-05, below 0.05\)", str(signs))
    plane = torch.randn(100, 2) @ torch.randn(2, 16)
    signs = find_collapse_signs(measure_spread(plane), 100)
    assert "few directions" in str(signs)
    assert "same feature" not in str(signs)
    assert not signs.clusters
    signs = find_collapse_signs({"largest_cluster_ratio": 0.6}, 100)
    assert str(signs) == "one cluster holds 60 % of the images"
    assert not signs.features
    assert not find_collapse_signs({"largest_cluster_ratio": 0.5}, 100)


def test_few_images_give_no_signs() -> None:
    assert not find_collapse_signs(measure_spread(torch.ones(31, 8)), 31)
    assert find_collapse_signs(measure_spread(torch.ones(32, 8)), 32)
