from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.features import units_of
from helpers.methods import prepared_method
from selcon_plugin.clustering import OutlierPolicy, PseudoLabels
from selcon_plugin.features import Embeddings
from selcon_plugin.methods.cluster_contrast import ClusterContrast

M, C = 14, 8
LABELS = [0, 1, -1, 0, 2, 2, 1, -1, 0, 2, 1, 2, -1, 0]  # 3 clusters, 3 outliers
CLASSES = [0, 1, 3, 0, 2, 2, 1, 4, 0, 2, 1, 2, 5, 0]
BATCH = torch.tensor([0, 2, 4, 7, 13, 2])  # an outlier twice
CAMIDS = torch.arange(M) % 3
units = units_of(C)


def make_method(
    name: str, labels: PseudoLabels, device: str = "cpu", **options: object
) -> ClusterContrast:
    method = prepared_method(name, C, labels, CAMIDS, device=device, **options)
    assert isinstance(method, ClusterContrast)
    return method


def step(method: ClusterContrast, *, seed: int) -> Tensor:
    features = Embeddings(units(len(BATCH), seed=seed))
    loss = method.loss(features, BATCH, CAMIDS[BATCH])["loss_cluster"]
    method.update(BATCH, features)
    return loss


def dictionary() -> Tensor:
    """Return the means of the clusters, followed by the features of the outliers."""
    features = units(M, seed=0)
    rows = [
        torch.stack([features[j] for j in range(M) if CLASSES[j] == k]).mean(dim=0)
        for k in range(6)
    ]
    return F.normalize(torch.stack(rows), dim=1)


def test_one_loss_over_clusters_and_outliers(device: str) -> None:
    labels = PseudoLabels.numbered(LABELS)
    method = make_method("OutlierAware", labels, device, temperature=0.1)
    rows = dictionary()
    torch.testing.assert_close(method.memory.bank.cpu(), rows, rtol=0, atol=1e-6)
    features = units(len(BATCH), seed=1)
    found = method.loss(Embeddings(features.to(device)), BATCH.to(device), None)
    wanted = 0.0
    for feature, image in zip(features, BATCH.tolist(), strict=True):
        logits = [float(feature @ row) / 0.1 for row in rows]
        total = math.log(sum(math.exp(logit) for logit in logits))
        wanted += (total - logits[CLASSES[image]]) / len(BATCH)
    assert found["loss_cluster"].item() == pytest.approx(wanted, rel=1e-5)


def test_an_outlier_writes_its_own_slot() -> None:
    labels = PseudoLabels.numbered(LABELS)
    method = make_method("OutlierAware", labels, bank_momentum=0.1)
    rows = dictionary()
    features = units(len(BATCH), seed=1)
    method.update(BATCH, Embeddings(features))
    for feature, image in zip(features, BATCH.tolist(), strict=True):
        row = CLASSES[image]
        rows[row] = F.normalize(0.1 * rows[row] + 0.9 * feature, dim=0)
    torch.testing.assert_close(method.memory.bank, rows, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"cluster_update": "hard", "focal_gamma": 2.0}])
def test_without_outliers_it_equals_cluster_contrast(options: dict[str, object]) -> None:
    labels = PseudoLabels.numbered([i % 3 for i in range(M)])
    found = make_method("OutlierAware", labels, camera_weight="batch", **options)
    wanted = make_method("ClusterContrast", labels, camera_weight="batch", **options)
    for seed in range(3):
        assert torch.equal(step(found, seed=seed), step(wanted, seed=seed))
    assert torch.equal(found.memory.bank, wanted.memory.bank)


def test_equals_cluster_contrast_with_singleton_clusters() -> None:
    labels = PseudoLabels.numbered(LABELS)
    singletons = OutlierPolicy("singleton")(
        labels,
        units(M, seed=0),
        None,
        lambda *_: labels,  # type: ignore[arg-type]
    )
    found = make_method("OutlierAware", labels)
    wanted = make_method("ClusterContrast", singletons)
    for seed in range(2):
        assert torch.equal(step(found, seed=seed), step(wanted, seed=seed))
    assert torch.equal(found.memory.bank, wanted.memory.bank)
    assert (found.labels < 0).sum() == 3  # the sampler's quota uses them


def test_camera_weights_do_not_apply_to_outliers() -> None:
    labels = PseudoLabels.numbered(LABELS)
    plain = make_method("OutlierAware", labels)
    weighted = make_method("OutlierAware", labels, camera_weight="cluster")
    index = torch.tensor([2, 7])
    features = Embeddings(units(2, seed=3))
    losses = [m.loss(features, index, CAMIDS[index]) for m in (plain, weighted)]
    assert losses[0]["loss_cluster"] == losses[1]["loss_cluster"] > 0
