from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.features import units_of
from helpers.methods import prepared_method
from selcon_plugin.clustering import DBSCANLabeler, OutlierPolicy, PseudoLabels
from selcon_plugin.features import Embeddings
from selcon_plugin.memory.cluster import ClusterMemory
from selcon_plugin.memory.writes import cluster_means
from selcon_plugin.methods import build_method
from selcon_plugin.methods.cap import CAP
from selcon_plugin.methods.cluster_contrast import ClusterContrast
from selcon_plugin.methods.vitc import ViTC

M, C = 30, 16
LABELS = PseudoLabels(torch.tensor([i // 5 if i < 25 else -1 for i in range(M)]))
CAMIDS = torch.full((M,), 2)
BATCH = torch.tensor([0, 1, 7, 12, 26, 18])
units = units_of(C)


def make(name: str, labels: PseudoLabels = LABELS, **options: Any) -> Any:
    return prepared_method(name, C, labels, torch.arange(M) % 3, **options)


def losses_of(method: Any) -> dict[str, float]:
    found = method.loss(Embeddings(units(len(BATCH), seed=3)), BATCH, None)
    return {name: value.item() for name, value in found.items()}


def test_identity_loss_equals_cluster_contrast() -> None:
    vitc: ViTC = make("ViTC")
    plain: ClusterContrast = make("ClusterContrast", temperature=0.07, bank_momentum=0.2)
    for seed in range(2):
        vitc.update(BATCH, Embeddings(units(len(BATCH), seed=seed)))
        plain.update(BATCH, Embeddings(units(len(BATCH), seed=seed)))
        assert torch.equal(vitc.identities.bank, plain.memory.bank)
        wanted = losses_of(plain)["loss_cluster"]
        assert losses_of(vitc)["loss_identity"] == pytest.approx(wanted)


def test_proxy_memory_equals_that_of_cap() -> None:
    vitc: ViTC = make("ViTC")
    cap: CAP = make("CAP")
    for method in (vitc, cap):
        method.update(BATCH, Embeddings(units(len(BATCH), seed=1)))
    assert torch.equal(vitc.proxies.bank, cap.proxies.bank)


def test_one_camera_makes_both_losses_equal() -> None:
    method = build_method("ViTC", M, C, proxy_weight=0.5)
    method.prepare(Embeddings(units(M, seed=0)), CAMIDS, LABELS)
    found = losses_of(method)
    assert found["loss_proxy"] == pytest.approx(0.5 * found["loss_identity"], rel=1e-6)


def test_kept_outliers_are_identities_with_one_proxy() -> None:
    features = units(M, seed=0)
    keep = OutlierPolicy("singleton")(LABELS, features, None, DBSCANLabeler())
    method: ViTC = make("ViTC", keep)
    assert method.identities.bank.shape == (10, C)
    outlier = int(keep.labels[26])
    assert torch.allclose(method.identities.bank[outlier], features[26], atol=1e-6)
    assert (method.proxies.clusters == outlier).sum() == 1
    written = units(1, seed=5)
    method.update(torch.tensor([26]), Embeddings(written))
    row = ClusterMemory(cluster_means(features, keep.labels), momentum=0.2)
    row.update(written, torch.tensor([outlier]))
    assert torch.equal(method.identities.bank, row.bank)
    proxy = int(method.proxies.proxies[26])
    assert torch.equal(method.proxies.bank[proxy], row.bank[outlier])
