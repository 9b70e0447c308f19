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

M, C, TAU = 24, 16, 0.2
LABELS = [i // 5 if i < 20 else -1 for i in range(M)]  # 4 clusters of 5, 4 outliers
CAMIDS = torch.arange(M) % 3
BATCH = torch.tensor([0, 1, 5, 22, 10, 17])
units = units_of(C)


def prepared(name: str = "MultiLevel", device: str = "cpu", **options: Any) -> Any:
    options = {"temperature": TAU, **options}
    return prepared_method(name, C, LABELS, CAMIDS, device=device, **options)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def in_loops(
    bank: Tensor, bank_labels: list[int], features: Tensor, own: Any, others: Any
) -> float:
    losses = []
    for feature, i in zip(features, BATCH.tolist(), strict=True):
        if LABELS[i] < 0:
            continue
        similarity = [float(feature @ row) for row in bank]
        logits = []
        for k in range(4):
            members = [similarity[j] for j, label in enumerate(bank_labels) if label == k]
            logits.append((own if k == LABELS[i] else others)(members) / TAU)
        losses.append(math.log(sum(map(math.exp, logits))) - logits[LABELS[i]])
    return mean(losses)


def test_loss_equals_its_definition(device: str) -> None:
    weights = {"intra_weight": 0.3, "inter_weight": 0.5, "centroid_weight": 0.7}
    method = prepared(device=device, **weights)
    features = units(len(BATCH), seed=3)
    losses = method.loss(Embeddings(features.to(device)), BATCH.to(device), None)
    clusters, instances = method.memory.bank.cpu(), method.instances.bank.cpu()
    wanted = {
        "loss_intra": 0.3 * in_loops(instances, LABELS, features, min, mean),
        "loss_inter": 0.5 * in_loops(instances, LABELS, features, mean, max),
        "loss_cluster": 0.7 * in_loops(clusters, [0, 1, 2, 3], features, mean, mean),
    }
    found = {name: loss.item() for name, loss in losses.items()}
    assert found == pytest.approx(wanted, rel=1e-5)


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


def test_centroid_loss_only_equals_cluster_contrast() -> None:
    options = {"cluster_update": "hard", "camera_weight": "batch", "focal_gamma": 1.0}
    levels = prepared(intra_weight=0.0, inter_weight=0.0, **options)
    plain = prepared("ClusterContrast", **options)
    for seed in range(3):
        embeddings = Embeddings(units(len(BATCH), seed=seed))
        losses = levels.loss(embeddings, BATCH, CAMIDS[BATCH])
        wanted = plain.loss(embeddings, BATCH, CAMIDS[BATCH])["loss_cluster"]
        assert torch.equal(sum(losses.values()), wanted)
        levels.update(BATCH, embeddings)
        plain.update(BATCH, embeddings)
        assert torch.equal(levels.memory.bank, plain.memory.bank)


def test_with_one_image_per_cluster_all_three_losses_are_equal() -> None:
    method = build_method("MultiLevel", M, C, intra_weight=1.0, inter_weight=1.0)
    method.prepare(Embeddings(units(M, seed=0)), None, PseudoLabels.each_its_own(M))
    losses = method.loss(Embeddings(units(len(BATCH), seed=3)), BATCH, None)
    torch.testing.assert_close(losses["loss_intra"], losses["loss_cluster"])
    torch.testing.assert_close(losses["loss_inter"], losses["loss_cluster"])


def test_camera_weights_apply_to_all_three_losses() -> None:
    labels = PseudoLabels.numbered([0] * 12 + [1] * 12)
    camids = torch.tensor([0] * 12 + [0, 1] * 6)  # one camera, then two
    index = torch.tensor([0, 12])
    features = units(2, seed=4)

    def losses(mode: str, rows: list[int]) -> dict[str, Tensor]:
        method = build_method("MultiLevel", M, C, camera_weight=mode)
        method.prepare(Embeddings(units(M, seed=0)), camids, labels)
        return method.loss(Embeddings(features[rows]), index[rows], camids[index[rows]])

    two_cameras = losses("none", [1])
    for name, loss in losses("multi_camera", [0, 1]).items():
        torch.testing.assert_close(loss, two_cameras[name] / 2)
