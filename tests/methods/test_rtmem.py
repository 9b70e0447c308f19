from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.features import units_of
from helpers.methods import prepared_method
from selcon_plugin.clustering import PseudoLabels
from selcon_plugin.features import Embeddings
from selcon_plugin.methods import build_method
from selcon_plugin.methods.rtmem import RTMem

M, C, TAU = 24, 16, 0.2
LABELS = [i // 5 if i < 20 else -1 for i in range(M)]  # 4 clusters of 5, 4 outliers
BATCH = torch.tensor([0, 1, 2, 5, 22, 6, 7, 17])
PLACES = {0: [0, 1, 2], 1: [3, 5, 6], 3: [7]}  # of each cluster's images in the batch
units = units_of(C)


def prepared(device: str = "cpu", **options: Any) -> RTMem:
    options = {"temperature": TAU, **options}
    method = prepared_method("RTMem", C, LABELS, device=device, **options)
    assert isinstance(method, RTMem)
    return method


def row_of(vector: Tensor, rows: Tensor) -> int:
    """Return the index of the row that equals the vector."""
    found = (rows - vector).abs().amax(dim=1) < 1e-6
    assert found.sum() == 1
    return int(found.int().argmax())


def test_a_cluster_row_is_initialized_with_one_of_its_images() -> None:
    begun = set()
    for seed in range(20):
        bank = prepared(seed=seed).memory.bank
        chosen = [row_of(row, units(M, seed=0)) for row in bank]
        assert [LABELS[i] for i in chosen] == [0, 1, 2, 3]
        begun.add(chosen[0])
    assert begun == {0, 1, 2, 3, 4}


def test_loss_equals_its_definition(device: str) -> None:
    method = prepared(device, instance_weight=0.7)
    features = units(len(BATCH), seed=3)
    losses = method.loss(Embeddings(features.to(device)), BATCH.to(device), None)
    cluster, instance = [], []
    for feature, i in zip(features, BATCH.tolist(), strict=True):
        if LABELS[i] < 0:
            continue
        exps = [math.exp(float(feature @ row) / TAU) for row in method.memory.bank.cpu()]
        cluster.append(-math.log(exps[LABELS[i]] / sum(exps)))
        exps = [math.exp(float(feature @ row) / TAU) for row in method.instances.bank.cpu()]
        own = sum(exps[j] for j in range(M) if LABELS[j] == LABELS[i])
        instance.append(-math.log(own / sum(exps)))
    wanted = {
        "loss_cluster": sum(cluster) / len(cluster),
        "loss_instance": 0.7 * sum(instance) / len(instance),
    }
    found = {name: loss.item() for name, loss in losses.items()}
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_random_image_of_the_batch_overwrites_its_clusters_row(device: str) -> None:
    method = prepared(device)
    instances = units(M, seed=0)
    kept = set()
    for step in range(20):
        before = method.memory.bank.cpu().clone()
        features = units(len(BATCH), seed=10 + step)
        method.update(BATCH.to(device), Embeddings(features.to(device)))
        after = method.memory.bank.cpu()
        for cluster, places in PLACES.items():
            chosen = row_of(after[cluster], features)
            assert chosen in places
            kept.add(chosen)
        assert torch.equal(after[2], before[2])  # not in the batch
        instances[BATCH] = features
        torch.testing.assert_close(method.instances.bank.cpu(), instances)
    assert kept == {0, 1, 2, 3, 5, 6, 7}


def test_sampling_depends_on_seed_and_step_only() -> None:
    features = Embeddings(units(len(BATCH), seed=3))

    def banks(seed: int) -> list[Tensor]:
        method = prepared(seed=seed)
        found = [method.memory.bank.clone()]
        for _ in range(3):
            method.update(BATCH, features)
            found.append(method.memory.bank.clone())
        return found

    first, again, other = banks(1), banks(1), banks(2)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


def test_new_clusters_keep_the_instance_memory() -> None:
    method = prepared()
    method.update(BATCH, Embeddings(units(len(BATCH), seed=3)))
    before = method.instances.bank.clone()
    labels = PseudoLabels.numbered([i // 4 for i in range(M)])
    method.prepare(Embeddings(units(M, seed=9)), None, labels)
    assert torch.equal(method.instances.bank, before)
    assert method.memory.bank.shape == (6, C)
    for cluster, row in enumerate(method.memory.bank):
        assert row_of(row, units(M, seed=9)) // 4 == cluster


def test_one_image_per_cluster_equals_cluster_contrast_without_momentum() -> None:
    method = build_method("RTMem", M, C, instance_weight=0.5)
    plain = build_method("ClusterContrast", M, C, bank_momentum=0.0)
    for each in (method, plain):
        each.prepare(Embeddings(units(M, seed=0)), None, PseudoLabels.each_its_own(M))
    for seed in range(3):
        embeddings = Embeddings(units(len(BATCH), seed=seed))
        losses = method.loss(embeddings, BATCH, None)
        wanted = plain.loss(embeddings, BATCH, None)["loss_cluster"]
        torch.testing.assert_close(losses["loss_cluster"], wanted)
        torch.testing.assert_close(losses["loss_instance"], 0.5 * wanted)
        method.update(BATCH, embeddings)
        plain.update(BATCH, embeddings)
        torch.testing.assert_close(method.memory.bank, plain.memory.bank)


def test_camera_weights_apply_to_both_losses() -> None:
    labels = PseudoLabels.numbered([0] * 12 + [1] * 12)
    camids = torch.tensor([0] * 12 + [0, 1] * 6)  # one camera, then two
    index = torch.tensor([0, 12])
    features = units(2, seed=4)

    def losses(mode: str, rows: list[int]) -> dict[str, Tensor]:
        method = build_method("RTMem", M, C, camera_weight=mode)
        method.prepare(Embeddings(units(M, seed=0)), camids, labels)
        return method.loss(Embeddings(features[rows]), index[rows], camids[index[rows]])

    two_cameras = losses("none", [1])
    for name, loss in losses("multi_camera", [0, 1]).items():
        torch.testing.assert_close(loss, two_cameras[name] / 2)
