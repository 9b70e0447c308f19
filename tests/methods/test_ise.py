from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.features import units_of
from helpers.methods import prepared_method
from selcon_plugin.features import Embeddings
from selcon_plugin.losses import cluster_contrastive_loss
from selcon_plugin.memory.cluster import ClusterMemory
from selcon_plugin.methods import Method
from selcon_plugin.methods.ise import (
    interpolation_degree,
    label_preserving_loss,
    support_samples,
)

M, C = 24, 16
LABELS = [i // 5 if i < 20 else -1 for i in range(M)]  # 4 clusters of 5, 4 outliers
CAMIDS = torch.arange(M) % 3
BATCH = torch.tensor([0, 1, 21, 5, 6, 10, 17, 2])
TARGETS = [LABELS[i] for i in BATCH.tolist()]
units = units_of(C)


def make_method(name: str = "ISE", *, epoch: int = 0, **options: Any) -> Method:
    method = prepared_method(name, C, LABELS, CAMIDS, **options)
    method.start_epoch(epoch)
    return method


def supports_in_loops(features: Tensor, bank: Tensor, degree: float) -> Tensor:
    rows = []
    for feature, target in zip(features, TARGETS, strict=True):
        others = [k for k in range(len(bank)) if k != target]
        nearest = max(others, key=lambda k: float(feature @ bank[k]))
        moved = feature + degree / 2 * (bank[nearest] - bank[target])
        rows.append(moved / moved.norm())
    return torch.stack(rows)


def preserving_in_loops(features: Tensor, supports: Tensor, temperature: float) -> float:
    losses = []
    for feature, target in zip(features.double(), TARGETS, strict=True):
        if target < 0:
            continue
        exps: dict[int, list[float]] = {}
        for support, other in zip(supports.double(), TARGETS, strict=True):
            exps.setdefault(other, []).append(math.exp(feature @ support / temperature))
        own = min(exps[target])
        others = sum(max(exps[k]) for k in exps if k not in (-1, target))
        losses.append(-math.log(own / (own + others)))
    return sum(losses) / len(losses)


def test_degree_increases_from_zero_to_one_half() -> None:
    assert interpolation_degree(0.0) == 0.0
    assert interpolation_degree(0.5) == pytest.approx(0.5 * math.log((math.e + 1) / 2))
    assert interpolation_degree(1.0) == pytest.approx(0.5)
    assert interpolation_degree(3.0) == interpolation_degree(1.0)


def test_support_samples_equal_their_definition(device: str) -> None:
    features, bank = units(len(BATCH), seed=3), units(4, seed=4)
    targets = torch.tensor(TARGETS)
    supports = support_samples(
        5.0 * features.to(device), bank.to(device), targets.to(device), degree=0.4
    ).cpu()
    inside = targets >= 0
    wanted = supports_in_loops(features, bank, 0.4)
    assert torch.allclose(supports[inside], wanted[inside], atol=1e-6)


def test_support_samples_of_degree_0_or_of_one_cluster_equal_the_images() -> None:
    features = units(5, seed=3)
    zeros = torch.zeros(5, dtype=torch.int64)
    still = support_samples(features, units(4, seed=4), zeros, degree=0.0)
    single = support_samples(features, units(1, seed=4), zeros, degree=0.5)
    assert torch.allclose(still, features)
    assert torch.allclose(single, features)


@pytest.mark.parametrize("temperature", [0.6, 0.05])
def test_preserving_loss_equals_its_definition(temperature: float, device: str) -> None:
    features, supports = units(len(BATCH), seed=3), units(len(BATCH), seed=5)
    loss = label_preserving_loss(
        2.0 * features.to(device),
        supports.to(device),
        torch.tensor(TARGETS, device=device),
        temperature=temperature,
    )
    wanted = preserving_in_loops(features, supports, temperature)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)


def test_preserving_loss_has_gradients_for_images_and_support_samples() -> None:
    features = units(len(BATCH), seed=3).requires_grad_()
    supports = units(len(BATCH), seed=5).requires_grad_()
    label_preserving_loss(features, supports, torch.tensor(TARGETS)).backward()
    for tensor in (features, supports):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert tensor.grad.any()
    assert features.grad is not None
    assert not features.grad[2].any()  # the outlier


def test_preserving_loss_of_outliers_only_is_zero() -> None:
    features = units(3, seed=3).requires_grad_()
    outliers = torch.full((3,), -1)
    loss = label_preserving_loss(features, features, outliers)
    loss.backward()
    assert loss.item() == 0.0
    assert features.grad is not None
    assert not features.grad.any()


def test_illegal_temperature_is_reported() -> None:
    with pytest.raises(ValueError, match=r"temperature .*got -1"):
        label_preserving_loss(
            units(2, seed=0), units(2, seed=0), torch.tensor([0, 1]), temperature=-1.0
        )


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_loss_equals_its_definition(weight: float) -> None:
    method = make_method(epoch=3, support_epochs=10, support_weight=weight)
    features, bank = units(len(BATCH), seed=3), method.memory.bank
    supports = supports_in_loops(features, bank, interpolation_degree(0.3))
    targets = torch.tensor(TARGETS)
    real, extended = (
        cluster_contrastive_loss(part, bank, targets) for part in (features, supports)
    )
    losses = method.loss(Embeddings(features), BATCH, CAMIDS[BATCH])
    wanted = (real + weight * extended) / (1 + weight)
    assert losses["loss_cluster"].item() == pytest.approx(wanted.item(), rel=1e-5)
    wanted_preserving = 0.1 * preserving_in_loops(features, supports, 0.6)
    assert losses["loss_preserving"].item() == pytest.approx(wanted_preserving, rel=1e-5)


def test_images_and_support_samples_together_are_one_batch() -> None:
    """With weight 1 both form one batch of Cluster Contrast, as in the released code."""
    method = make_method(epoch=5, support_epochs=10)
    features, targets = units(len(BATCH), seed=3), torch.tensor(TARGETS)
    supports = method._supports(features, targets)
    joined = cluster_contrastive_loss(
        torch.cat([features, supports]), method.memory.bank, targets.repeat(2)
    )
    losses = method.loss(Embeddings(features), BATCH, CAMIDS[BATCH])
    assert losses["loss_cluster"].item() == pytest.approx(joined.item(), rel=1e-5)


def test_memory_is_written_with_images_and_support_samples() -> None:
    method = make_method(epoch=5, support_epochs=10)
    memory = ClusterMemory(method.memory.bank, momentum=0.2, update="hard")
    features, targets = units(len(BATCH), seed=3), torch.tensor(TARGETS)
    supports = supports_in_loops(features, memory.bank, interpolation_degree(0.5))
    method.loss(Embeddings(features), BATCH, CAMIDS[BATCH])
    method.update(BATCH, Embeddings(features))
    memory.update(torch.cat([features, supports]), targets.repeat(2))
    assert torch.allclose(method.memory.bank, memory.bank, atol=1e-6)


def test_without_support_samples_it_equals_cluster_contrast() -> None:
    ise = make_method(epoch=5, support_weight=0.0, preserving_weight=0.0)
    plain = make_method("ClusterContrast", bank_momentum=0.2, cluster_update="hard")
    for seed in range(3):
        embeddings = Embeddings(units(len(BATCH), seed=seed))
        losses = [m.loss(embeddings, BATCH, CAMIDS[BATCH]) for m in (ise, plain)]
        assert losses[0] == losses[1]
        for method in (ise, plain):
            method.update(BATCH, embeddings)
        assert torch.equal(ise.memory.bank, plain.memory.bank)


def test_the_first_epoch_contrasts_images_only() -> None:
    """With degree 0 the support samples equal the images, as in Cluster Contrast."""
    embeddings = Embeddings(units(len(BATCH), seed=1))
    ise, plain = make_method(), make_method("ClusterContrast")
    first, second = (
        m.loss(embeddings, BATCH, CAMIDS[BATCH])["loss_cluster"] for m in (ise, plain)
    )
    assert first.item() == pytest.approx(second.item(), rel=1e-6)
