from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.methods import prepared_method
from selcon_plugin.clustering import EnsembleLabeler, PseudoLabels
from selcon_plugin.features import Embeddings
from selcon_plugin.methods import Method, build_method

M, C = 12, 16
LABELS = [0, 0, 0, 0, 1, 1, 1, 2, 2, -1, -1, 3]
LABELINGS = [
    [0, 0, 1, 1, 2, 2, -1, 3, 3, -1, -1, -1],
    [0, 0, 0, 0, 1, 1, 1, 2, 2, -1, -1, -1],
    [0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, -1],
]
BATCH = torch.tensor([0, 2, 4, 6, 8, 10, 11])


def units(count: int, *, seed: int, dim: int = C) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=generator), dim=1)


def make_labels(labelings: list[list[int]] = LABELINGS) -> PseudoLabels:
    return PseudoLabels(torch.tensor(LABELS), labelings=torch.tensor(labelings))


def make_method(found: PseudoLabels | None = None, **options: Any) -> Method:
    return prepared_method("MGCEHCL", C, found or make_labels(), **options)


def priority(i: int, j: int) -> float:
    if i == j:
        return 1.0
    return sum(row[i] == row[j] != -1 for row in LABELINGS) / 3


def test_priorities_computed_by_hand() -> None:
    """Image 0 always agrees with 1, with 2 and 3 in two of three cases, with 4 in one."""
    assert [priority(0, j) for j in range(6)] == [1, 1, 2 / 3, 2 / 3, 1 / 3, 0]
    method = make_method()
    shared = method._pair_priority(BATCH, torch.tensor(LABELS)[BATCH])
    for row, i in zip(shared, BATCH.tolist(), strict=True):
        assert row.tolist() == pytest.approx([priority(i, j) for j in range(M)])
    assert method.cluster_priority[0].item() == pytest.approx((1 + 1 + 2 / 3 + 2 / 3) / 4)
    assert method.cluster_priority[11] == 1.0  # the only image of its cluster
    for i, label in enumerate(LABELS[:9]):
        priorities = [priority(i, j) for j in range(M) if LABELS[j] == label]
        wanted = sum(priorities) / len(priorities)
        assert method.cluster_priority[i].item() == pytest.approx(wanted)


def test_losses_equal_their_definitions() -> None:
    method = make_method(temperature=0.1, instance_weight=0.5)
    features = units(len(BATCH), seed=3)
    found = method.loss(Embeddings(features), BATCH, None)
    clusters, instances = [], []
    for feature, i in zip(features.double(), BATCH.tolist(), strict=True):
        if LABELS[i] < 0:
            continue
        priorities = [priority(i, j) for j in range(M)]
        inside = [priorities[j] for j in range(M) if LABELS[j] == LABELS[i]]
        logits = [float(feature @ row) / 0.1 for row in method.centroids.bank.double()]
        total = math.log(sum(math.exp(logit) for logit in logits))
        clusters.append(sum(inside) / len(inside) * (total - logits[LABELS[i]]))
        logits = [float(feature @ row) / 0.1 for row in method.instances.bank.double()]
        total = math.log(sum(math.exp(logit) for logit in logits))
        pulled = sum(a * (total - x) for a, x in zip(priorities, logits, strict=True))
        instances.append(pulled / sum(priorities))
    wanted = sum(clusters) / len(clusters)
    assert found["loss_cluster"].item() == pytest.approx(wanted, rel=1e-5)
    wanted = 0.5 * sum(instances) / len(instances)
    assert found["loss_instance"].item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("camera_weight", ["none", "cluster"])
def test_one_granularity_equals_hcl(camera_weight: str) -> None:
    """All eps of the ensemble are equal, so all priorities are 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    pids = torch.arange(10).repeat_interleave(8)
    centers = torch.randn(10, C, generator=generator)
    features = centers[pids] + 0.9 * torch.randn(80, C, generator=generator)
    camids = torch.arange(80) % 3
    found = EnsembleLabeler(eps=0.5, delta=0.0, k1=10, k2=3)(features)
    assert found.num_clusters > 4
    assert found.num_outliers > 0
    embeddings = Embeddings(F.normalize(features, dim=1))
    index = torch.arange(0, 80, 3)
    losses = []
    for name in ("HCL", "MGCEHCL"):
        method = build_method(name, 80, C, camera_weight=camera_weight)
        method.prepare(embeddings, camids, found)
        batch = Embeddings(units(len(index), seed=5))
        losses.append(method.loss(batch, index, camids[index]))
    for name, loss in losses[0].items():
        assert loss.item() > 0
        assert losses[1][name].item() == pytest.approx(loss.item(), rel=1e-6)


def test_disagreement_lowers_the_weight() -> None:
    agreed = make_method(make_labels([LABELS] * 3))
    embeddings = Embeddings(units(len(BATCH), seed=3))
    less = make_method().loss(embeddings, BATCH, None)["loss_cluster"]
    assert less < agreed.loss(embeddings, BATCH, None)["loss_cluster"]


def test_instance_level_labels_need_no_ensemble() -> None:
    singletons = PseudoLabels.each_its_own(M)
    method = make_method(singletons)
    other = build_method("HCL", M, C)
    other.prepare(Embeddings(units(M, seed=0)), None, singletons)
    embeddings = Embeddings(units(len(BATCH), seed=3))
    losses = method.loss(embeddings, BATCH, None)
    for name, loss in other.loss(embeddings, BATCH, None).items():
        assert losses[name].item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("found", [make_labels(), PseudoLabels.each_its_own(M)])
def test_priorities_are_restored_from_a_checkpoint(found: PseudoLabels) -> None:
    method = make_method(found)
    fresh = build_method("MGCEHCL", M, C)
    fresh.load_state_dict(method.state_dict())
    embeddings = Embeddings(units(len(BATCH), seed=3))
    losses = fresh.loss(embeddings, BATCH, None)
    for name, loss in method.loss(embeddings, BATCH, None).items():
        assert torch.equal(loss, losses[name])


def test_labels_without_an_ensemble_are_refused() -> None:
    method = build_method("MGCEHCL", M, C)
    embeddings = Embeddings(units(M, seed=0))
    with pytest.raises(ValueError, match=r"CLUSTERING\.LABELER to Ensemble"):
        method.prepare(embeddings, None, PseudoLabels(torch.tensor(LABELS)))
    with pytest.raises(ValueError, match=r"pseudo-labels of its 12 images, got none"):
        method.prepare(embeddings, None, None)
    with pytest.raises(ValueError, match=r"got those of 2"):
        method.prepare(embeddings, None, PseudoLabels.numbered([0, 1]))
