from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.features import units_of
from selcon_plugin.losses import softmax_triplet_loss

TARGETS = [0, 1, 0, -1, 2, 0, 1, -1]
units = units_of(5)


def loss_in_loops(features: Tensor, targets: list[int], temperature: float) -> float:
    losses = []
    for i, target in enumerate(targets):
        if target < 0:
            continue
        to_own, to_others = [0.0], []
        for j, other in enumerate(targets):
            distance = (features[i].double() - features[j].double()).norm().item()
            if other == target and i != j:
                to_own.append(distance)
            elif other not in (-1, target):
                to_others.append(distance)
        positive = math.exp(max(to_own) / temperature)
        negative = math.exp(min(to_others) / temperature)
        losses.append(-math.log(negative / (positive + negative)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_equals_definition_by_loops(temperature: float, device: str) -> None:
    features = units(8, seed=0)
    loss = softmax_triplet_loss(
        3.0 * features.to(device),  # of any length
        torch.tensor(TARGETS, device=device),
        temperature=temperature,
    )
    wanted = loss_in_loops(features, TARGETS, temperature)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("targets", [[0, 0, 0], [-1, -1, -1], [0, -1, -1]])
def test_without_negatives_the_loss_is_zero(targets: list[int]) -> None:
    features = units(3, seed=0).requires_grad_()
    loss = softmax_triplet_loss(features, torch.tensor(targets))
    loss.backward()
    assert loss.item() == 0.0
    assert features.grad is not None
    assert not features.grad.any()


def test_gradient_equals_the_numerical_one() -> None:
    features = units(8, seed=1).requires_grad_()
    targets = torch.tensor(TARGETS)
    softmax_triplet_loss(features, targets, temperature=0.5).backward()
    assert features.grad is not None
    direction = units(8, seed=2)
    h = 1e-3
    ahead, behind = (
        loss_in_loops(F.normalize(features.detach() + s * h * direction), TARGETS, 0.5)
        for s in (1, -1)
    )
    slope = (features.grad * direction).sum().item()
    assert slope == pytest.approx((ahead - behind) / (2 * h), rel=1e-2)


def test_equal_images_have_a_finite_gradient() -> None:
    features = units(1, seed=0).repeat(4, 1).requires_grad_()
    loss = softmax_triplet_loss(features, torch.tensor([0, 0, 1, 1]), temperature=0.05)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2.0), abs=0.02)
    assert features.grad is not None
    assert features.grad.isfinite().all()


def test_illegal_temperature_is_reported() -> None:
    with pytest.raises(ValueError, match=r"temperature .*got 0"):
        softmax_triplet_loss(units(2, seed=0), torch.tensor([0, 1]), temperature=0.0)
