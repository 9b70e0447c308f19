from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.features import units_of
from helpers.methods import prepared_method
from selcon_plugin.clustering import PseudoLabels
from selcon_plugin.features import Embeddings
from selcon_plugin.methods import Method, build_method

M, C = 24, 16
LABELS = [i // 5 if i < 20 else -1 for i in range(M)]  # 4 clusters of 5, 4 outliers
CAMIDS = torch.arange(M) % 3
units = units_of(C)


def make_method(name: str = "ClusterContrast", **options: Any) -> Method:
    return prepared_method(name, C, LABELS, CAMIDS, **options)


def step(method: Method, index: Tensor, *, seed: int) -> Tensor:
    embeddings = Embeddings(units(len(index), seed=seed))
    losses = method.loss(embeddings, index, CAMIDS[index])
    method.update(index, embeddings)
    return torch.stack(list(losses.values())).sum()


BATCH = torch.tensor([0, 1, 5, 6, 10, 17])


def loss_in_loops(bank: Tensor, features: Tensor, targets: list[int], tau: float) -> float:
    total = 0.0
    for feature, target in zip(features.double(), targets, strict=True):
        logits = [(feature @ row).item() / tau for row in bank.double()]
        denominator = sum(torch.tensor(logits, dtype=torch.float64).exp().tolist())
        total -= logits[target] - torch.tensor(denominator).log().item()
    return total / len(targets)


def test_memory_contains_the_cluster_means() -> None:
    method = make_method()
    features = units(M, seed=0)
    wanted = [features[5 * c : 5 * c + 5].mean(dim=0) for c in range(4)]
    assert torch.allclose(method.memory.bank, F.normalize(torch.stack(wanted), dim=1))


def test_loss_equals_its_definition() -> None:
    method = make_method(temperature=0.1)
    features = units(len(BATCH), seed=3)
    losses = method.loss(Embeddings(features), BATCH, CAMIDS[BATCH])
    targets = [LABELS[i] for i in BATCH.tolist()]
    wanted = loss_in_loops(method.memory.bank, features, targets, 0.1)
    assert losses["loss_cluster"].item() == pytest.approx(wanted, rel=1e-5)


def test_hard_update_writes_the_least_similar_sample() -> None:
    method = make_method(cluster_update="hard", bank_momentum=0.0)
    before = method.memory.bank.clone()
    features = units(len(BATCH), seed=3)
    step(method, BATCH, seed=3)
    for cluster, places in {0: [0, 1], 1: [2, 3], 2: [4], 3: [5]}.items():
        hardest = min(places, key=lambda p: float(features[p] @ before[cluster]))
        assert torch.allclose(method.memory.bank[cluster], features[hardest], atol=1e-6)


def test_loss_reads_and_update_writes() -> None:
    method = make_method()
    before = copy.deepcopy(method.state_dict())
    features = units(len(BATCH), seed=3).requires_grad_()
    method.loss(Embeddings(features), BATCH, CAMIDS[BATCH])["loss_cluster"].backward()
    assert features.grad is not None
    assert features.grad.any()
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    method.update(BATCH, Embeddings(features))
    changed = {n for n, t in method.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"_step", "memory.bank"}


@pytest.mark.parametrize("mode", ["batch", "cluster", "multi_camera"])
def test_camera_weights_apply_to_the_samples(mode: str) -> None:
    labels = PseudoLabels.numbered([0] * 12 + [1] * 12)
    camids = torch.tensor([0] * 12 + [0, 1] * 6)  # one camera, then two
    index = torch.tensor([0, 1, 12, 13])
    features = Embeddings(units(4, seed=4))

    def losses(mode: str, rows: Tensor) -> float:
        method = build_method("ClusterContrast", M, C, camera_weight=mode)
        method.prepare(Embeddings(units(M, seed=0)), camids, labels)
        part = Embeddings(features.global_features[rows])
        return method.loss(part, index[rows], camids[index[rows]])["loss_cluster"].item()

    one = losses("none", torch.tensor([0, 1]))
    two = losses("none", torch.tensor([2, 3]))
    entropy = torch.tensor(2.0).log().item()
    weights = {
        "batch": (2 / (1 + torch.e), 2 * torch.e / (1 + torch.e)),  # e^0 and e^1 bits
        "cluster": (0.0, torch.tensor(1 + entropy).log().item()),
        "multi_camera": (0.0, 1.0),
    }[mode]
    wanted = (weights[0] * one + weights[1] * two) / 2
    assert losses(mode, torch.arange(4)) == pytest.approx(wanted, rel=1e-5)


def test_focal_factor_reduces_the_weight_of_easy_samples() -> None:
    plain = make_method(temperature=0.5)
    focal = make_method(temperature=0.5, focal_gamma=2.0)
    easy = Embeddings(plain.memory.bank[:1].clone())
    hard = Embeddings(F.normalize(-plain.memory.bank[:1], dim=1))
    index = torch.tensor([0])

    def ratio(method: Method) -> float:
        easy_loss = method.loss(easy, index, None)["loss_cluster"]
        return float(easy_loss / method.loss(hard, index, None)["loss_cluster"])

    assert ratio(focal) < 0.5 * ratio(plain)


def test_new_clusters_replace_the_old(tmp_path: Any) -> None:
    method = make_method()
    labels = PseudoLabels.numbered([i // 4 for i in range(M)])
    method.prepare(Embeddings(units(M, seed=9)), CAMIDS, labels)
    assert method.memory.bank.shape == (6, C)
    assert torch.equal(method.labels, labels.labels)


@pytest.mark.parametrize("name", ["ClusterContrast", "SelConCluster"])
@pytest.mark.parametrize("mode", ["none", "batch", "cluster"])
def test_four_steps_equal_two_steps_a_checkpoint_and_two_steps(
    name: str, mode: str
) -> None:
    unbroken = make_method(name, camera_weight=mode)
    broken = make_method(name, camera_weight=mode)
    for i in range(2):
        step(unbroken, BATCH, seed=i)
        step(broken, BATCH, seed=i)
    stream = io.BytesIO()
    torch.save(broken.state_dict(), stream)
    stream.seek(0)
    resumed = build_method(name, M, C, camera_weight=mode)  # its memory is still empty
    resumed.load_state_dict(torch.load(stream, weights_only=True))
    assert resumed.prepared
    for i in range(2, 4):
        assert torch.equal(step(unbroken, BATCH, seed=i), step(resumed, BATCH, seed=i))
    for name_, tensor in unbroken.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name_]), name_


def test_labels_of_other_images_are_refused() -> None:
    method = build_method("ClusterContrast", M, C)
    with pytest.raises(ValueError, match=r"pseudo-labels of its 24 images, got none"):
        method.prepare(Embeddings(units(M, seed=0)), None, None)
    with pytest.raises(ValueError, match=r"got those of 2"):
        method.prepare(Embeddings(units(M, seed=0)), None, PseudoLabels.numbered([0, 1]))


def test_singletons_only_are_restored_from_a_checkpoint() -> None:
    """Use the labels of OutlierPolicy("singleton") if no clusters were found."""
    method = build_method("ClusterContrast", M, C)
    singletons = PseudoLabels(torch.arange(M))
    method.prepare(Embeddings(units(M, seed=0)), None, singletons)
    fresh = build_method("ClusterContrast", M, C)
    fresh.load_state_dict(method.state_dict())
    assert method.instance_level
    assert fresh.instance_level


def test_instance_level_labels_are_restored_from_a_checkpoint() -> None:
    method = build_method("ClusterContrast", M, C)
    method.prepare(Embeddings(units(M, seed=0)), None, PseudoLabels.each_its_own(M))
    assert method.instance_level
    assert step(method, BATCH, seed=1) > 0
    fresh = build_method("ClusterContrast", M, C)
    fresh.load_state_dict(method.state_dict())
    assert fresh.instance_level
    fresh.load_state_dict(make_method().state_dict())
    assert not fresh.instance_level
