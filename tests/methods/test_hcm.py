from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.features import units_of
from helpers.methods import prepared_method
from selcon_plugin.clustering import PseudoLabels
from selcon_plugin.features import Embeddings
from selcon_plugin.methods import build_method
from selcon_plugin.methods.cluster_contrast import ClusterContrast
from selcon_plugin.methods.hcm import HCM

M, C, TAU = 24, 16, 0.2
LABELS = [i // 5 if i < 20 else -1 for i in range(M)]  # 4 clusters of 5, 4 outliers
CAMIDS = torch.arange(M) % 3
BATCH = torch.tensor([0, 1, 5, 22, 10, 17])
units = units_of(C)


def prepared(name: str = "HCM", device: str = "cpu", **options: Any) -> Any:
    options = {"temperature": TAU, **options}
    return prepared_method(name, C, LABELS, CAMIDS, device=device, **options)


def in_loops(method: HCM, features: Tensor, gamma: float) -> tuple[float, float]:
    centroids, instances = method.memory.bank.cpu(), method.instances.bank.cpu()
    identity, image = [], []
    for feature, i in zip(features, BATCH.tolist(), strict=True):
        if LABELS[i] < 0:
            continue
        exps = [math.exp(float(feature @ row) / TAU) for row in centroids]
        probability = exps[LABELS[i]] / sum(exps)
        identity.append(-((1 - probability) ** gamma) * math.log(probability))
        similarity = [float(feature @ row) for row in instances]
        positive = min(similarity[j] for j in range(M) if LABELS[j] == LABELS[i] and j != i)
        negative = max(similarity[j] for j in range(M) if LABELS[j] not in (LABELS[i], -1))
        image.append(math.log1p(math.exp((negative - positive) / TAU)))
    return sum(identity) / len(identity), sum(image) / len(image)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 4.0])
def test_loss_equals_its_definition(gamma: float, device: str) -> None:
    method = prepared(device=device, focal_gamma=gamma, constraint_weight=0.7)
    features = units(len(BATCH), seed=3)
    losses = method.loss(Embeddings(features.to(device)), BATCH.to(device), None)
    identity, image = in_loops(method, features, gamma)
    assert losses["loss_cluster"].item() == pytest.approx(identity, rel=1e-5)
    assert losses["loss_constraint"].item() == pytest.approx(0.7 * image, rel=1e-5)


def test_update_writes_both_memories(device: str) -> None:
    method = prepared(device=device, bank_momentum=0.3)
    clusters = method.memory.bank.cpu().clone()
    instances = units(M, seed=0)
    features = units(len(BATCH), seed=3)
    method.update(BATCH.to(device), Embeddings(features.to(device)))
    for feature, i in zip(features, BATCH.tolist(), strict=True):
        instances[i] = F.normalize(0.3 * instances[i] + 0.7 * feature, dim=0)
        if LABELS[i] >= 0:
            row = clusters[LABELS[i]]
            clusters[LABELS[i]] = F.normalize(0.3 * row + 0.7 * feature, dim=0)
    torch.testing.assert_close(method.memory.bank.cpu(), clusters)
    torch.testing.assert_close(method.instances.bank.cpu(), instances)


@pytest.mark.parametrize("cluster_update", ["mean", "hard"])
def test_without_factor_and_constraint_it_equals_cluster_contrast(
    cluster_update: str,
) -> None:
    options = {"cluster_update": cluster_update, "camera_weight": "batch"}
    hybrid = prepared(focal_gamma=0.0, constraint_weight=0.0, **options)
    plain: ClusterContrast = prepared("ClusterContrast", **options)
    for seed in range(3):
        embeddings = Embeddings(units(len(BATCH), seed=seed))
        losses = hybrid.loss(embeddings, BATCH, CAMIDS[BATCH])
        wanted = plain.loss(embeddings, BATCH, CAMIDS[BATCH])["loss_cluster"]
        assert torch.equal(sum(losses.values()), wanted)
        hybrid.update(BATCH, embeddings)
        plain.update(BATCH, embeddings)
        assert torch.equal(hybrid.memory.bank, plain.memory.bank)


def test_dynamic_factor_is_a_detached_weight() -> None:
    features = units(1, seed=3).requires_grad_()
    index = torch.tensor([0])

    def gradient(gamma: float) -> Tensor:
        losses = prepared(focal_gamma=gamma).loss(Embeddings(features), index, None)
        return torch.autograd.grad(losses["loss_cluster"], features)[0]

    loss = prepared(focal_gamma=0.0).loss(Embeddings(features), index, None)["loss_cluster"]
    factor = (1 - math.exp(-loss.item())) ** 3
    torch.testing.assert_close(gradient(3.0), factor * gradient(0.0))


def test_camera_weights_apply_to_both_levels() -> None:
    labels = PseudoLabels.numbered([0] * 12 + [1] * 12)
    camids = torch.tensor([0] * 12 + [0, 1] * 6)  # one camera, then two
    index = torch.tensor([0, 12])
    features = units(2, seed=4)

    def losses(mode: str, rows: list[int]) -> dict[str, Tensor]:
        method = build_method("HCM", M, C, camera_weight=mode)
        method.prepare(Embeddings(units(M, seed=0)), camids, labels)
        return method.loss(Embeddings(features[rows]), index[rows], camids[index[rows]])

    two_cameras = losses("none", [1])
    for name, loss in losses("multi_camera", [0, 1]).items():
        torch.testing.assert_close(loss, two_cameras[name] / 2)
