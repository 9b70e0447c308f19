from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from helpers.features import units_of
from helpers.methods import prepared_method
from selcon_plugin.clustering import PseudoLabels
from selcon_plugin.features import Embeddings
from selcon_plugin.methods import Method, build_method

M, C = 24, 16
LABELS = [i // 5 if i < 20 else -1 for i in range(M)]  # 4 clusters of 5, 4 outliers
CAMIDS = torch.arange(M) % 3
BATCH = torch.tensor([0, 1, 5, 22, 6, 10, 17])
units = units_of(C)


def make_method(labels: list[int] | None = None, **options: Any) -> Method:
    found = LABELS if labels is None else labels
    return prepared_method("HCL", C, found, CAMIDS, **options)


def test_losses_equal_their_definitions() -> None:
    method = make_method(temperature=0.1, instance_weight=0.5)
    features = units(len(BATCH), seed=3)
    found = method.loss(Embeddings(features), BATCH, CAMIDS[BATCH])
    clusters, instances = [], []
    for feature, image in zip(features.double(), BATCH.tolist(), strict=True):
        if LABELS[image] < 0:
            continue
        logits = [float(feature @ row) / 0.1 for row in method.centroids.bank.double()]
        total = math.log(sum(math.exp(logit) for logit in logits))
        clusters.append(total - logits[LABELS[image]])
        logits = [float(feature @ row) / 0.1 for row in method.instances.bank.double()]
        total = math.log(sum(math.exp(logit) for logit in logits))  # outliers included
        own = [logits[j] for j in range(M) if LABELS[j] == LABELS[image]]
        instances.append(sum(total - logit for logit in own) / len(own))
    assert set(found) == {"loss_cluster", "loss_instance"}
    wanted = sum(clusters) / len(clusters)
    assert found["loss_cluster"].item() == pytest.approx(wanted, rel=1e-5)
    wanted = 0.5 * sum(instances) / len(instances)
    assert found["loss_instance"].item() == pytest.approx(wanted, rel=1e-5)


def test_one_image_per_cluster_makes_both_losses_equal() -> None:
    method = make_method(list(range(M)), instance_weight=1.0)
    losses = method.loss(Embeddings(units(len(BATCH), seed=3)), BATCH, None)
    wanted = losses["loss_cluster"].item()
    assert losses["loss_instance"].item() == pytest.approx(wanted, rel=1e-5)


def test_cluster_loss_equals_that_of_cluster_contrast() -> None:
    options: dict[str, Any] = {"camera_weight": "batch", "focal_gamma": 2.0}
    method = make_method(**options)
    other = build_method("ClusterContrast", M, C, **options)
    other.prepare(Embeddings(units(M, seed=0)), CAMIDS, PseudoLabels.numbered(LABELS))
    for step in range(3):
        embeddings = Embeddings(units(len(BATCH), seed=step))
        losses = method.loss(embeddings, BATCH, CAMIDS[BATCH])
        wanted = other.loss(embeddings, BATCH, CAMIDS[BATCH])
        assert torch.equal(losses["loss_cluster"], wanted["loss_cluster"])
        method.update(BATCH, embeddings)
        other.update(BATCH, embeddings)
    assert torch.equal(method.centroids.bank, other.memory.bank)


def test_outliers_have_no_loss() -> None:
    method = make_method()
    features = units(len(BATCH), seed=3).requires_grad_()
    losses = method.loss(Embeddings(features), BATCH, None)
    torch.stack(list(losses.values())).sum().backward()
    assert features.grad is not None
    assert features.grad.any(dim=1).tolist() == [LABELS[i] >= 0 for i in BATCH.tolist()]


def test_camera_weights_apply_to_both_losses() -> None:
    """Samples of a cluster in one camera only have weight 0 in this mode."""
    method = make_method(camera_weight="multi_camera")
    camids = torch.tensor([0] * 12 + [0, 1] * 6)
    labels = PseudoLabels.numbered([0] * 12 + [1] * 12)
    method.prepare(Embeddings(units(M, seed=0)), camids, labels)
    index = torch.tensor([0, 1, 2])
    losses = method.loss(Embeddings(units(3, seed=3)), index, camids[index])
    assert [loss.item() for loss in losses.values()] == [0.0, 0.0]


def test_update_equals_the_loop() -> None:
    method = make_method(bank_momentum=0.3)
    rows, images = method.centroids.bank.clone(), method.instances.bank.clone()
    index = torch.tensor([0, 1, 0, 22, 7])
    features = units(len(index), seed=4)
    method.update(index, Embeddings(features))
    for image, feature in zip(index.tolist(), features, strict=True):
        images[image] = F.normalize(0.3 * images[image] + 0.7 * feature, dim=0)
        if LABELS[image] >= 0:
            own = LABELS[image]
            rows[own] = F.normalize(0.3 * rows[own] + 0.7 * feature, dim=0)
    assert torch.allclose(method.centroids.bank, rows, atol=1e-6)
    assert torch.allclose(method.instances.bank, images, atol=1e-6)
