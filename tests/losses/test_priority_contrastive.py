from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.features import units_of
from selcon_plugin.losses import cluster_contrastive_loss, priority_contrastive_loss

B, C, R = 5, 8, 12
units = units_of(C)


def priorities() -> Tensor:
    generator = torch.Generator().manual_seed(7)
    priority = torch.randint(0, 4, (B, R), generator=generator) / 3
    priority[2] = 0.0
    return priority


def loss_in_loops(
    features: Tensor, bank: Tensor, weights: list[float], temperature: float
) -> float:
    losses = []
    for feature, row, weight in zip(
        features.double(), priorities().tolist(), weights, strict=True
    ):
        logits = [float(feature @ other) / temperature for other in bank.double()]
        denominator = math.log(sum(math.exp(logit) for logit in logits))
        if sum(row):
            pairs = zip(row, logits, strict=True)
            pulled = sum(a * (denominator - logit) for a, logit in pairs)
            losses.append(weight * pulled / sum(row))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("weighted", [False, True])
def test_loss_equals_its_definition(weighted: bool, device: str) -> None:
    features, bank = units(B, seed=0), units(R, seed=1)
    weights = torch.tensor([1.0, 0.5, 3.0, 0.0, 2.0])
    loss = priority_contrastive_loss(
        3 * features.to(device),  # scaled to unit length
        bank.to(device),
        priorities().to(device),
        temperature=0.2,
        sample_weight=weights.to(device) if weighted else None,
    )
    wanted = loss_in_loops(features, bank, weights.tolist() if weighted else [1.0] * B, 0.2)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)


def test_one_positive_is_info_nce() -> None:
    """With one row per cluster and one positive per image it equals the cluster loss."""
    features, bank = units(B, seed=0), units(R, seed=1)
    targets = torch.tensor([3, 0, -1, 11, 3])
    priority = F.one_hot(targets.clamp(min=0), R) * torch.tensor(
        [[2], [0.3], [0], [1], [1]]
    )
    loss = priority_contrastive_loss(features, bank, priority, temperature=0.1)
    wanted = cluster_contrastive_loss(features, bank, targets, temperature=0.1)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_bank_is_a_constant_and_no_positive_no_gradient() -> None:
    features, bank = units(B, seed=0).requires_grad_(), units(R, seed=1).requires_grad_()
    priority_contrastive_loss(features, bank, priorities()).backward()
    assert bank.grad is None
    assert features.grad is not None
    assert features.grad.any(dim=1).tolist() == [True, True, False, True, True]
    features.grad = None
    nothing = priority_contrastive_loss(features, bank, torch.zeros(B, R))
    nothing.backward()
    assert nothing == 0
    assert not features.grad.any()


def test_autocast_keeps_full_precision() -> None:
    features, bank = units(B, seed=0), units(R, seed=1)
    wanted = priority_contrastive_loss(features, bank, priorities())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(priority_contrastive_loss(features, bank, priorities()), wanted)


def test_wrong_arguments_are_refused() -> None:
    features, bank = units(B, seed=0), units(R, seed=1)
    with pytest.raises(ValueError, match=r"temperature .*got 0"):
        priority_contrastive_loss(features, bank, priorities(), temperature=0)
    with pytest.raises(ValueError, match=r"5 images and 12 rows, got shape \(12, 5\)"):
        priority_contrastive_loss(features, bank, priorities().T)
