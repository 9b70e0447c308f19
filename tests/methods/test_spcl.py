from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers.features import units_of
from helpers.methods import prepared_method
from selcon_plugin.clustering import PseudoLabels
from selcon_plugin.features import Embeddings
from selcon_plugin.losses import instance_contrastive_loss
from selcon_plugin.methods.spcl import SpCL

GOLDEN = Path(__file__).parents[1] / "golden" / "cluster_memory.npz"
M, C = 14, 8
LABELS = [0, 1, -1, 0, 2, 2, 1, -1, 0, 2, 1, 2, -1, 0]  # 3 clusters, 3 outliers
CLASSES = [0, 1, 3, 0, 2, 2, 1, 4, 0, 2, 1, 2, 5, 0]
BATCH = torch.tensor([0, 2, 4, 7, 13, 2])  # an outlier twice
units = units_of(C)


def make_method(labels: list[int] = LABELS, device: str = "cpu", **options: float) -> SpCL:
    method = prepared_method("SpCL", C, labels, device=device, **options)
    assert isinstance(method, SpCL)
    return method


def test_outliers_are_classes_after_the_clusters() -> None:
    method = make_method()
    assert method.classes.tolist() == CLASSES
    assert method.labels.tolist() == PseudoLabels.numbered(LABELS).labels.tolist()
    fresh = SpCL(M, C)
    fresh.load_state_dict(method.state_dict())
    assert fresh.classes.tolist() == CLASSES
    assert fresh.num_classes == 6


def test_loss_equals_its_definition(device: str) -> None:
    method = make_method(device=device, temperature=0.1)
    features = units(len(BATCH), seed=1)
    index = BATCH.to(device)
    found = method.loss(Embeddings(features.to(device)), index, None)["loss_class"]
    rows = units(M, seed=0).double()
    wanted = 0.0
    for feature, image in zip(features.double(), BATCH.tolist(), strict=True):
        logits = []
        for k in range(6):
            members = [j for j in range(M) if CLASSES[j] == k]
            mean = sum(float(feature @ rows[j]) for j in members) / len(members)
            logits.append(mean / 0.1)
        total = math.log(sum(math.exp(logit) for logit in logits))
        wanted += (total - logits[CLASSES[image]]) / len(BATCH)
    assert found.item() == pytest.approx(wanted, rel=1e-5)


def test_loss_equals_the_instance_loss_with_means() -> None:
    method = make_method()
    features = units(len(BATCH), seed=1)
    found = method.loss(Embeddings(features), BATCH, None)["loss_class"]
    wanted = instance_contrastive_loss(
        features,
        method.memory.bank,
        method.classes,
        method.classes[BATCH],
        own="mean",
        others="mean",
    )
    torch.testing.assert_close(found, wanted)


def test_images_write_their_own_rows(device: str) -> None:
    method = make_method(device=device, bank_momentum=0.2)
    features = units(len(BATCH), seed=1)
    method.update(BATCH.to(device), Embeddings(features.to(device)))
    rows = units(M, seed=0)
    for feature, image in zip(features, BATCH.tolist(), strict=True):
        rows[image] = F.normalize(0.2 * rows[image] + 0.8 * feature, dim=0)
    torch.testing.assert_close(method.memory.bank.cpu(), rows, rtol=0, atol=1e-6)


def test_new_clusters_keep_the_memory() -> None:
    method = SpCL(M, C)
    assert method.clustering_features() is None
    method.prepare(Embeddings(units(M, seed=0)), None, PseudoLabels.numbered(LABELS))
    method.update(BATCH, Embeddings(units(len(BATCH), seed=1)))
    before = method.memory.bank.clone()
    features = method.clustering_features()
    assert features is not None
    assert torch.equal(features, before)
    others = PseudoLabels.numbered([i // 7 for i in range(M)])
    method.prepare(Embeddings(units(M, seed=2)), None, others)
    assert torch.equal(method.memory.bank, before)
    assert method.num_classes == 2


def test_released_code() -> None:
    with np.load(GOLDEN) as arrays:
        golden = {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays}
    method = SpCL(200, 48, bank_momentum=0.2, temperature=0.05)
    labels = golden["spcl_labels"]  # each outlier has its own number
    singletons = labels.bincount()[labels] == 1
    assert singletons.any()
    clusters = PseudoLabels.numbered(torch.where(singletons, -1, labels))
    method.prepare(Embeddings(golden["features"]), None, clusters)
    features = golden["spcl_inputs"].requires_grad_()
    unit = F.normalize(features, dim=1)
    index = golden["spcl_index"]
    losses = [
        method.loss(Embeddings(unit[i : i + 1]), index[i : i + 1], None)["loss_class"]
        for i in range(len(index))
    ]
    # The released code takes the logarithm of p + 1e-6, a difference of 1.3e-5 here.
    loss = -((-torch.stack(losses)).exp() + 1e-6).log().mean()
    assert loss.item() == pytest.approx(golden["spcl_loss"].item(), rel=0, abs=1e-6)
    whole = method.loss(Embeddings(unit), index, None)["loss_class"]
    assert whole.item() == pytest.approx(golden["spcl_loss"].item(), rel=0, abs=2e-5)
    # The recorded gradient is with respect to unit vectors.
    found, wanted = (
        torch.autograd.grad(out, features, grad, retain_graph=True)[0]
        for out, grad in ((loss, None), (unit, golden["spcl_grad"]))
    )
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    method.update(index, Embeddings(unit))
    torch.testing.assert_close(method.memory.bank, golden["spcl_after"], rtol=0, atol=1e-5)
