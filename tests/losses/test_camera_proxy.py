from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from helpers.features import units_of
from selcon_plugin.losses import (
    associate_proxies,
    cluster_contrastive_loss,
    inter_camera_loss,
    intra_camera_loss,
    online_association_loss,
    selective_contrastive_loss,
)

B, C = 7, 8
# The proxies are those of five clusters in three cameras and an unknown one.
CLUSTERS = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 4])
CAMERAS = torch.tensor([0, 1, 2, 0, -1, 2, -1, 0, 1, 1])
P = len(CLUSTERS)
TARGETS = torch.tensor([0, 2, -1, 4, 8, 5, 0])
WEIGHTS = torch.tensor([1.0, 0.5, 3.0, 2.0, 0.0, 1.5, 0.7])
TAU = 0.2
units = units_of(C)


FEATURES, BANK = units(B, seed=0), units(P, seed=1)
SIMILARITY = FEATURES @ BANK.T


def contrast(row: list[float], positives: list[int], negatives: list[int]) -> float:
    candidates = positives + negatives
    total = math.log(sum(math.exp(row[k] / TAU) for k in candidates))
    return sum(total - row[p] / TAU for p in positives) / len(positives)


def mean_in_loops(one: Callable[[list[float], int], float], weights: Tensor) -> float:
    """Average the loss of one image over the images that have a proxy."""
    losses = [
        weight * one(row, target)
        for row, target, weight in zip(
            SIMILARITY.double().tolist(), TARGETS.tolist(), weights.tolist(), strict=True
        )
        if target >= 0
    ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("weights", [torch.ones(B), WEIGHTS], ids=["plain", "weighted"])
def test_intra_camera_loss_equals_its_definition(weights: Tensor, device: str) -> None:
    def one(row: list[float], own: int) -> float:
        if CAMERAS[own] < 0:
            return 0.0
        others = [k for k in range(P) if CAMERAS[k] == CAMERAS[own] and k != own]
        return contrast(row, [own], others)

    found = intra_camera_loss(
        SIMILARITY.to(device),
        TARGETS.to(device),
        CAMERAS.to(device),
        temperature=TAU,
        sample_weight=weights.to(device),
    )
    assert found.item() == pytest.approx(mean_in_loops(one, weights), rel=1e-5)


@pytest.mark.parametrize("num_negatives", [1, 3, 50])
@pytest.mark.parametrize("weights", [torch.ones(B), WEIGHTS], ids=["plain", "weighted"])
def test_inter_camera_loss_equals_its_definition(
    num_negatives: int, weights: Tensor, device: str
) -> None:
    def one(row: list[float], own: int) -> float:
        positives = [k for k in range(P) if CLUSTERS[k] == CLUSTERS[own]]
        others = [k for k in range(P) if CLUSTERS[k] != CLUSTERS[own]]
        hardest = sorted(others, key=lambda k: -row[k])[:num_negatives]
        return contrast(row, positives, hardest)

    found = inter_camera_loss(
        SIMILARITY.to(device),
        TARGETS.to(device),
        CLUSTERS.to(device),
        temperature=TAU,
        num_negatives=num_negatives,
        sample_weight=weights.to(device),
    )
    assert found.item() == pytest.approx(mean_in_loops(one, weights), rel=1e-5)


def associated(mixed: list[float], num_positives: int) -> list[int]:
    best = []
    for camera in (-1, 0, 1, 2):
        proxies = [k for k in range(P) if CAMERAS[k] == camera]
        best.append(max(proxies, key=lambda k: mixed[k]))
    return sorted(best, key=lambda k: -mixed[k])[:num_positives]


@pytest.mark.parametrize("image_weight", [0.0, 0.15, 1.0])
@pytest.mark.parametrize(("num_positives", "num_negatives"), [(1, 2), (3, 4), (9, 50)])
def test_online_association_loss_equals_its_definition(
    image_weight: float, num_positives: int, num_negatives: int, device: str
) -> None:
    bank = BANK.double()

    def one(row: list[float], own: int) -> float:
        proxy_row = (bank[own] @ bank.T).tolist()
        mixed = [
            image_weight * row[k] + (1 - image_weight) * proxy_row[k] for k in range(P)
        ]
        positives = associated(mixed, num_positives)
        others = [k for k in range(P) if k not in positives]
        hardest = sorted(others, key=lambda k: -mixed[k])[:num_negatives]
        return contrast(row, positives, hardest)

    found = online_association_loss(
        SIMILARITY.to(device),
        BANK.to(device),
        TARGETS.to(device),
        CAMERAS.to(device),
        temperature=TAU,
        image_weight=image_weight,
        num_positives=num_positives,
        num_negatives=num_negatives,
    )
    assert found.item() == pytest.approx(mean_in_loops(one, torch.ones(B)), rel=1e-5)


def test_with_one_camera_the_intra_camera_loss_equals_the_cluster_loss() -> None:
    found = intra_camera_loss(
        SIMILARITY, TARGETS, torch.zeros(P, dtype=torch.int64), temperature=TAU
    )
    wanted = cluster_contrastive_loss(FEATURES, BANK, TARGETS, temperature=TAU)
    assert torch.allclose(found, wanted)


def test_one_proxy_per_cluster_and_all_negatives_equal_the_cluster_loss() -> None:
    found = inter_camera_loss(
        SIMILARITY, TARGETS, torch.arange(P), temperature=TAU, num_negatives=P - 1
    )
    wanted = cluster_contrastive_loss(FEATURES, BANK, TARGETS, temperature=TAU)
    assert torch.allclose(found, wanted)


def test_one_camera_per_proxy_has_no_intra_camera_loss() -> None:
    similarity = SIMILARITY.clone().requires_grad_()
    loss = intra_camera_loss(similarity, TARGETS, torch.arange(P))
    loss.backward()
    assert loss == 0
    assert similarity.grad is not None
    assert not similarity.grad.any()


def test_inter_camera_loss_equals_the_selective_loss_on_proxies() -> None:
    """All positives have equal weight, and all other proxies are negatives."""
    inside = TARGETS >= 0
    losses = []
    for feature, own in zip(FEATURES[inside], TARGETS[inside], strict=True):
        positive = CLUSTERS[own] == CLUSTERS
        count = int(positive.sum())
        losses.append(
            selective_contrastive_loss(
                feature[None],
                BANK,
                positive.nonzero().T,
                (~positive).nonzero().T,
                positive_weight=torch.full((count,), 1 / count),
                temperature=TAU,
            )
        )
    found = inter_camera_loss(SIMILARITY, TARGETS, CLUSTERS, temperature=TAU)
    assert torch.allclose(found, torch.stack(losses).mean())


def test_image_weight_selects_image_or_proxy_similarity() -> None:
    """At weight 0 only the proxy selects positives, at weight 1 only the image does."""
    other = FEATURES.flip(0) @ BANK.T
    own = BANK[TARGETS.clamp(min=0)] @ BANK.T
    by_proxy = associate_proxies(own, CAMERAS)
    by_image = associate_proxies(SIMILARITY, CAMERAS)
    assert not torch.equal(by_proxy, by_image)

    def positives(similarity: Tensor, image_weight: float) -> Tensor:
        similarity = similarity.clone().requires_grad_()
        loss = online_association_loss(
            similarity, BANK, TARGETS, CAMERAS, temperature=10.0, image_weight=image_weight
        )
        loss.backward()
        assert similarity.grad is not None
        return similarity.grad < 0  # at this temperature only positives are pulled

    inside = (TARGETS >= 0)[:, None]
    assert torch.equal(positives(SIMILARITY, 0.0), by_proxy & inside)
    assert torch.equal(positives(other, 0.0), by_proxy & inside)
    assert torch.equal(positives(SIMILARITY, 1.0), by_image & inside)


def test_renamed_proxies_change_nothing() -> None:
    order = torch.randperm(P, generator=torch.Generator().manual_seed(2))
    targets = torch.where(TARGETS < 0, -1, torch.argsort(order)[TARGETS])
    similarity, bank = SIMILARITY[:, order], BANK[order]
    clusters, cameras = CLUSTERS[order], CAMERAS[order]
    pairs = [
        (
            intra_camera_loss(SIMILARITY, TARGETS, CAMERAS),
            intra_camera_loss(similarity, targets, cameras),
        ),
        (
            inter_camera_loss(SIMILARITY, TARGETS, CLUSTERS, num_negatives=3),
            inter_camera_loss(similarity, targets, clusters, num_negatives=3),
        ),
        (
            online_association_loss(SIMILARITY, BANK, TARGETS, CAMERAS, num_negatives=3),
            online_association_loss(similarity, bank, targets, cameras, num_negatives=3),
        ),
    ]
    for before, after in pairs:
        assert torch.allclose(before, after)


def every_loss(similarity: Tensor, targets: Tensor, bank: Tensor) -> list[Tensor]:
    return [
        intra_camera_loss(similarity, targets, CAMERAS[: len(bank)]),
        inter_camera_loss(similarity, targets, CLUSTERS[: len(bank)]),
        online_association_loss(similarity, bank, targets, CAMERAS[: len(bank)]),
    ]


def test_outliers_only_have_no_loss_and_no_gradient() -> None:
    similarity = SIMILARITY.clone().requires_grad_()
    losses = every_loss(similarity, torch.full((B,), -1), BANK)
    torch.stack(losses).sum().backward()
    assert torch.stack(losses).tolist() == [0.0, 0.0, 0.0]
    assert similarity.grad is not None
    assert not similarity.grad.any()


def test_an_outlier_gets_no_gradient() -> None:
    features = FEATURES.clone().requires_grad_()
    bank = BANK.clone().requires_grad_()
    torch.stack(every_loss(features @ BANK.T, TARGETS, bank)).sum().backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()
    assert torch.equal(features.grad.any(dim=1), TARGETS >= 0)
    assert bank.grad is None


def test_missing_proxies_are_refused() -> None:
    empty = torch.zeros(2, 0)
    with pytest.raises(ValueError, match="no camera proxies: cluster the images first"):
        every_loss(empty, torch.full((2,), -1), torch.zeros(0, C))


def test_illegal_values_are_reported() -> None:
    with pytest.raises(ValueError, match=r"temperature .*got 0"):
        intra_camera_loss(SIMILARITY, TARGETS, CAMERAS, temperature=0.0)
    with pytest.raises(ValueError, match=r"num_negatives .*1.*got 0"):
        inter_camera_loss(SIMILARITY, TARGETS, CLUSTERS, num_negatives=0)
    with pytest.raises(ValueError, match=r"image_weight .*\[0, 1\].*got 1.5"):
        online_association_loss(SIMILARITY, BANK, TARGETS, CAMERAS, image_weight=1.5)
    with pytest.raises(ValueError, match=r"num_positives .*1.*got 0"):
        associate_proxies(SIMILARITY, CAMERAS, num_positives=0)
