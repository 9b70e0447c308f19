from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from helpers.features import units_of
from selcon_plugin.losses import (
    class_similarity,
    cluster_contrastive_loss,
    instance_contrastive_loss,
)

B, C, R = 6, 8, 14
LABELS = torch.tensor([0, 0, 1, 2, 2, 2, -1, 1, 3, 0, -1, 3, 1, 2])
TARGETS = torch.tensor([0, 1, -1, 3, 2, 2])
units = units_of(C)


def reduce(values: list[float], how: str) -> float:
    if how == "mean":
        return sum(values) / len(values)
    return max(values) if how == "max" else min(values)


def loss_in_loops(
    features: Tensor, bank: Tensor, own: str, others: str, temperature: float
) -> float:
    losses = []
    for feature, target in zip(features.double(), TARGETS.tolist(), strict=True):
        if target < 0:
            continue
        logits = []
        for k in range(4):
            rows = [r for r in range(R) if LABELS[r] == k]
            values = [float(feature @ bank[r].double()) for r in rows]
            logits.append(reduce(values, own if k == target else others) / temperature)
        total = math.log(sum(math.exp(logit) for logit in logits))
        losses.append(total - logits[target])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("own", ["mean", "max", "min"])
@pytest.mark.parametrize("others", ["mean", "max", "min"])
def test_loss_equals_its_definition(own: str, others: str, device: str) -> None:
    features, bank = units(B, seed=0), units(R, seed=1)
    found = instance_contrastive_loss(
        features.to(device),
        bank.to(device),
        LABELS.to(device),
        TARGETS.to(device),
        temperature=0.2,
        own=own,  # type: ignore[arg-type]
        others=others,  # type: ignore[arg-type]
    )
    wanted = loss_in_loops(features, bank, own, others, 0.2)
    assert found.item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("own", ["mean", "max", "min"])
def test_one_instance_per_class_equals_the_cluster_loss(own: str) -> None:
    features, bank = units(B, seed=0), units(4, seed=1)
    found = instance_contrastive_loss(
        features,
        bank,
        torch.arange(4),
        TARGETS,
        own=own,  # type: ignore[arg-type]
    )
    assert torch.allclose(found, cluster_contrastive_loss(features, bank, TARGETS))


def test_gradient_reaches_the_features_and_not_the_bank() -> None:
    features = units(B, seed=0).double().requires_grad_()
    bank = units(R, seed=1).requires_grad_()
    instance_contrastive_loss(features, bank, LABELS, TARGETS).backward()  # type: ignore[no-untyped-call]
    assert bank.grad is None
    assert features.grad is not None
    assert not features.grad[2].any()  # an outlier
    assert features.grad[TARGETS >= 0].any(dim=1).all()


def test_weights_scale_each_images_loss() -> None:
    features, bank = units(B, seed=0), units(R, seed=1)
    weight = torch.tensor([2.0, 0.0, 5.0, 0.0, 0.0, 0.0])
    found = instance_contrastive_loss(features, bank, LABELS, TARGETS, sample_weight=weight)
    first = instance_contrastive_loss(features[:1], bank, LABELS, TARGETS[:1])
    assert found.item() == pytest.approx(2 * first.item() / 5, rel=1e-5)


def test_batch_of_outliers_has_loss_zero() -> None:
    features = units(2, seed=0).requires_grad_()
    targets = torch.tensor([-1, -1])
    loss = instance_contrastive_loss(features, units(R, seed=1), LABELS, targets)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0.0
    assert features.grad is not None
    assert not features.grad.any()


def test_class_without_rows_has_no_similarity() -> None:
    similarity = torch.tensor([[0.25, 0.75]])
    for how in ("mean", "max", "min"):
        found = class_similarity(similarity, torch.tensor([0, 2]), 3, how)  # type: ignore[arg-type]
        assert found.tolist() == [[0.25, -math.inf, 0.75]]


def test_wrong_arguments_are_reported() -> None:
    features, bank = units(B, seed=0), units(R, seed=1)
    with pytest.raises(ValueError, match=r"temperature .*got 0"):
        instance_contrastive_loss(features, bank, LABELS, TARGETS, temperature=0)
    with pytest.raises(ValueError, match="no row of the bank has a class"):
        instance_contrastive_loss(features, bank, torch.full((R,), -1), TARGETS)
    with pytest.raises(ValueError, match="own class of an image has no row"):
        instance_contrastive_loss(
            features, bank, torch.where(LABELS == 1, 2, LABELS), TARGETS.clamp(0, 1)
        )
    with pytest.raises(ValueError, match=r"reduction .*mean, max, min"):
        class_similarity(torch.ones(1, 1), torch.tensor([0]), 1, "sum")  # type: ignore[arg-type]
