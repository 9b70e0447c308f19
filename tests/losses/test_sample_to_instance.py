from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from helpers.features import units_of
from selcon_plugin.losses import (
    cluster_contrastive_loss,
    sample_constraint_loss,
    sample_to_instance_loss,
)

B, C, R, TAU = 6, 8, 12, 0.2
LABELS = torch.tensor([0, 0, 1, 2, 2, 2, -1, 1, 3, 0, -1, 1])
INDEX = torch.tensor([0, 7, 6, 8, 3, 5])  # 8 is the only image of its class, 6 an outlier
TARGETS = LABELS[INDEX]
LOSSES = [sample_to_instance_loss, sample_constraint_loss]
Loss = Callable[..., Tensor]
units = units_of(C)


def compute(loss: Loss, features: Tensor, bank: Tensor, **changed: Tensor) -> Tensor:
    arguments = {"bank_labels": LABELS, "targets": TARGETS, "temperature": TAU}
    if loss is sample_constraint_loss:
        arguments["index"] = INDEX
    arguments = {
        name: value.to(features.device) if isinstance(value, Tensor) else value
        for name, value in (arguments | changed).items()
    }
    return loss(features, bank, **arguments)


def instance_in_loops(similarity: list[float], target: int) -> float:
    exps = [math.exp(s / TAU) for s in similarity]
    own = sum(e for e, label in zip(exps, LABELS.tolist(), strict=True) if label == target)
    return -math.log(own / sum(exps))


def constraint_in_loops(similarity: list[float], target: int, row: int) -> float:
    labeled = list(enumerate(LABELS.tolist()))
    positives = [similarity[j] for j, label in labeled if label == target and j != row]
    negatives = [similarity[j] for j, label in labeled if label not in (target, -1)]
    hardest = min(positives, default=similarity[row])
    return math.log1p(math.exp((max(negatives) - hardest) / TAU))


def in_loops(loss: Loss, features: Tensor, bank: Tensor) -> list[float]:
    similarity = (features.double() @ bank.double().T).tolist()
    losses = []
    for i, (target, row) in enumerate(zip(TARGETS.tolist(), INDEX.tolist(), strict=True)):
        if target < 0:
            continue
        if loss is sample_to_instance_loss:
            losses.append(instance_in_loops(similarity[i], target))
        else:
            losses.append(constraint_in_loops(similarity[i], target, row))
    return losses


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_equals_its_definition(loss: Loss, device: str) -> None:
    features, bank = units(B, seed=0), units(R, seed=1)
    found = compute(loss, 3.0 * features.to(device), bank.to(device))
    wanted = in_loops(loss, features, bank)
    assert found.item() == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_scale_each_images_loss(loss: Loss) -> None:
    features, bank = units(B, seed=0), units(R, seed=1)
    weight = torch.tensor([2.0, 0.0, 7.0, 0.0, 0.5, 0.0])
    found = compute(loss, features, bank, sample_weight=weight)
    first, _, _, fifth, _ = in_loops(loss, features, bank)
    assert found.item() == pytest.approx((2.0 * first + 0.5 * fifth) / 5, rel=1e-5)


def test_one_row_per_class_equals_the_cluster_loss() -> None:
    features, bank, targets = units(B, seed=0), units(4, seed=1), TARGETS
    found = sample_to_instance_loss(features, bank, torch.arange(4), targets)
    torch.testing.assert_close(found, cluster_contrastive_loss(features, bank, targets))


def test_constraint_is_the_softmax_over_the_two_hardest_rows() -> None:
    features, bank = units(1, seed=0), units(2, seed=1)
    index = targets = torch.tensor([0])
    found = sample_constraint_loss(features, bank, torch.arange(2), index, targets)
    torch.testing.assert_close(found, cluster_contrastive_loss(features, bank, targets))


def test_constraint_without_another_class_is_0_with_a_gradient() -> None:
    features = units(2, seed=0).requires_grad_()
    labels, index = torch.tensor([0, 0, -1]), torch.tensor([0, 1])
    loss = sample_constraint_loss(features, units(3, seed=1), labels, index, labels[:2])
    loss.backward()
    assert loss.item() == 0.0
    assert features.grad is not None
    assert not features.grad.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_reaches_the_clustered_features_and_not_the_bank(loss: Loss) -> None:
    features, bank = units(B, seed=0).requires_grad_(), units(R, seed=1).requires_grad_()
    compute(loss, features, bank).backward()
    assert bank.grad is None
    assert features.grad is not None
    assert features.grad.any(dim=1).tolist() == (TARGETS >= 0).tolist()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bank_labels", [LABELS, torch.arange(R)])
def test_batch_of_outliers_has_loss_0(loss: Loss, bank_labels: Tensor) -> None:
    features = units(B, seed=0).requires_grad_()
    targets = torch.full((B,), -1)
    found = compute(
        loss, features, units(R, seed=1), targets=targets, bank_labels=bank_labels
    )
    found.backward()
    assert found.item() == 0.0
    assert features.grad is not None
    assert not features.grad.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_keeps_full_precision(loss: Loss) -> None:
    features, bank = units(B, seed=0).bfloat16(), units(R, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = compute(loss, features, bank)
    assert torch.equal(found, compute(loss, features.float(), bank))


@pytest.mark.parametrize("loss", LOSSES)
def test_wrong_arguments_are_reported(loss: Loss) -> None:
    features, bank = units(B, seed=0), units(R, seed=1)
    with pytest.raises(ValueError, match=r"temperature .*got 0"):
        compute(loss, features, bank, temperature=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="own class of an image has no row"):
        compute(loss, features, bank, bank_labels=torch.where(LABELS == 3, 0, LABELS))
