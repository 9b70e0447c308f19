from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.features import units_of
from helpers.methods import prepared_method
from selcon_plugin.clustering import PseudoLabels
from selcon_plugin.features import Embeddings
from selcon_plugin.losses import cluster_contrastive_loss
from selcon_plugin.methods import build_method
from selcon_plugin.methods.dcmip import DCMIP

GOLDEN = Path(__file__).parents[1] / "golden" / "cluster_memory.npz"
M, C, TAU = 24, 16, 0.2
LABELS = [i // 5 if i < 20 else -1 for i in range(M)]  # 4 clusters of 5, 4 outliers
BATCH = torch.tensor([0, 1, 2, 5, 22, 6, 7, 17])
PLACES = {0: [0, 1, 2], 1: [3, 5, 6], 3: [7]}  # of each cluster's images in the batch
units = units_of(C)


def prepared(device: str = "cpu", **options: Any) -> DCMIP:
    settings = {"temperature": TAU, "instance_epoch": 0, **options}
    method = prepared_method("DCMIP", C, LABELS, device=device, **settings)
    assert isinstance(method, DCMIP)
    return method


def rows_of(vectors: Tensor, rows: Tensor) -> list[int]:
    """Return which of the rows each vector is."""
    found = (vectors[:, None] - rows).abs().amax(dim=2) < 1e-6
    assert (found.sum(dim=1) == 1).all()
    return found.int().argmax(dim=1).tolist()


def in_loops(bank: Tensor, features: Tensor) -> float:
    """Compute InfoNCE over slots ``(clusters, S, C)``, the hardest slot of each cluster."""
    losses = []
    for feature, i in zip(features, BATCH.tolist(), strict=True):
        if LABELS[i] < 0:
            continue
        logits = []
        for k, slots in enumerate(bank):
            similarity = [float(feature @ row) / TAU for row in slots]
            logits.append(min(similarity) if k == LABELS[i] else max(similarity))
        losses.append(math.log(sum(map(math.exp, logits))) - logits[LABELS[i]])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("margin", [0.0, 0.2, 100.0])
def test_loss_equals_its_definition(margin: float, device: str) -> None:
    method = prepared(device, margin=margin, instance_slots=3, instance_weight=0.7)
    index, features = BATCH.to(device), units(len(BATCH), seed=3)
    method.update(index, Embeddings(units(len(BATCH), seed=5).to(device)))
    losses = method.loss(Embeddings(features.to(device)), index, None)
    hard = in_loops(method.hard_memory.bank.cpu()[:, None], features)
    mean = in_loops(method.mean_memory.bank.cpu()[:, None], features)
    slots = in_loops(method.slots.bank.cpu().view(4, 3, C), features)
    wanted = {
        "loss_cluster": 0.5 * (hard + max(mean - margin, 0.0)),
        "loss_instance": 0.7 * slots,
    }
    found = {name: loss.item() for name, loss in losses.items()}
    assert found == pytest.approx(wanted, rel=1e-5)


def test_within_the_margin_only_hard_proxies_have_a_gradient() -> None:
    method = prepared(margin=100.0, instance_epoch=1)
    method.update(BATCH, Embeddings(units(len(BATCH), seed=5)))
    features = units(len(BATCH), seed=3).requires_grad_()
    loss = method.loss(Embeddings(features), BATCH, None)["loss_cluster"]
    hard = cluster_contrastive_loss(
        features, method.hard_memory.bank, method.labels[BATCH], temperature=TAU
    )
    found, wanted = (torch.autograd.grad(each, features)[0] for each in (loss, 0.5 * hard))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("other_mean", [0.0, 100.0])
def test_margin_uses_the_batch_of_all_ranks(
    other_mean: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings = Embeddings(units(len(BATCH), seed=3))
    proxies = prepared(margin=0.0).mean_memory.bank[:, None]
    mean = in_loops(proxies, embeddings.global_features)  # the hard proxies are equal
    method = prepared(margin=0.9 * mean)
    monkeypatch.setattr(
        "selcon_plugin.methods.dcmip.gather_batch",
        lambda own: torch.cat([own, torch.tensor([other_mean])]),
    )
    loss = method.loss(embeddings, BATCH, None)["loss_cluster"].item()
    within = (mean + other_mean) / 2 < 0.9 * mean
    assert loss == pytest.approx(0.5 * mean + (0.0 if within else 0.05 * mean), rel=1e-5)


def test_instance_proxies_start_at_their_epoch() -> None:
    method = prepared(instance_epoch=2)
    embeddings = Embeddings(units(len(BATCH), seed=3))
    names = []
    for epoch in range(4):
        method.start_epoch(epoch)
        names.append(set(method.loss(embeddings, BATCH, None)))
    both = {"loss_cluster", "loss_instance"}
    assert names == [{"loss_cluster"}, {"loss_cluster"}, both, both]


def test_cluster_proxies_equal_the_released_hybrid_memory() -> None:
    with np.load(GOLDEN) as arrays:
        golden = {name: torch.from_numpy(arrays[name]) for name in arrays}
    targets, clusters = golden["targets"], len(golden["centroids"])
    start, after = (golden[f"hhcl_CMhybrid_{name}"].chunk(2) for name in ("init", "after"))
    momentum = golden["momentum"].item()
    num_images = clusters + len(targets)
    method = build_method(
        "DCMIP",
        num_images,
        golden["inputs"].shape[1],
        temperature=golden["temp"].item(),
        bank_momentum=momentum,
        margin=0.0,
        instance_slots=1,
    )
    assert isinstance(method, DCMIP)
    # One image per cluster, which equals its mean, is followed by the batch.
    labels = torch.cat([torch.arange(clusters), targets])
    features = torch.cat([start[0], F.normalize(golden["inputs"], dim=1)])
    method.prepare(Embeddings(features), None, PseudoLabels(labels))
    method.hard_memory.reset(start[0])
    method.mean_memory.reset(start[1])
    index = torch.arange(clusters, num_images)
    batch = Embeddings(features[clusters:])
    loss = method.loss(batch, index, None)["loss_cluster"]
    settings = {"temperature": golden["temp"].item()}
    mean = cluster_contrastive_loss(batch.global_features, start[1], targets, **settings)
    # A bracket in the released code halves the weight of the mean once more.
    released = golden["hhcl_CMhybrid_loss"].item() + 0.25 * mean.item()
    assert loss.item() == pytest.approx(released, rel=0, abs=1e-5)
    method.update(index, batch)
    for memory, rows in zip((method.hard_memory, method.mean_memory), after, strict=True):
        torch.testing.assert_close(memory.bank, rows, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_instance_proxies_are_random_images(slots: int, device: str) -> None:
    method = prepared(device, instance_slots=slots)
    initial = method.slots.bank.cpu().view(4, slots, C)
    for cluster in range(4):
        chosen = set(rows_of(initial[cluster], units(M, seed=0)))
        assert {LABELS[i] for i in chosen} == {cluster}
        assert len(chosen) == min(slots, 5)  # distinct, as a cluster has five images
    sampled = set()
    for step in range(20):
        before = method.slots.bank.cpu().clone().view(4, slots, C)
        features = units(len(BATCH), seed=10 + step)
        method.update(BATCH.to(device), Embeddings(features.to(device)))
        after = method.slots.bank.cpu().view(4, slots, C)
        for cluster, places in PLACES.items():
            chosen = set(rows_of(after[cluster], features))
            assert chosen <= set(places)
            assert len(chosen) == min(slots, len(places))
            sampled |= chosen
        assert torch.equal(after[2], before[2])  # not in the batch
    assert sampled == {0, 1, 2, 3, 5, 6, 7}


def test_sampling_depends_on_seed_and_step_only() -> None:
    features = Embeddings(units(len(BATCH), seed=3))

    def banks(seed: int) -> list[Tensor]:
        method = prepared(seed=seed, instance_slots=2)
        found = [method.slots.bank.clone()]
        for _ in range(3):
            method.update(BATCH, features)
            found.append(method.slots.bank.clone())
        return found

    first, again, other = banks(1), banks(1), banks(2)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


def test_one_image_per_cluster_equals_cluster_contrast() -> None:
    method = build_method("DCMIP", M, C, margin=0.0, instance_epoch=0)
    plain = build_method("ClusterContrast", M, C)
    for each in (method, plain):
        each.prepare(Embeddings(units(M, seed=0)), None, PseudoLabels.each_its_own(M))
    for seed in range(3):
        embeddings = Embeddings(units(len(BATCH), seed=seed))
        losses = method.loss(embeddings, BATCH, None)
        wanted = plain.loss(embeddings, BATCH, None)["loss_cluster"]
        torch.testing.assert_close(losses["loss_cluster"], wanted)
        if seed == 0:  # the instance proxies have no momentum
            torch.testing.assert_close(losses["loss_instance"], wanted)
        method.update(BATCH, embeddings)
        plain.update(BATCH, embeddings)
        torch.testing.assert_close(method.hard_memory.bank, plain.memory.bank)
    assert len(method.slots.bank) == M  # and not 16 copies of the images


def test_camera_weights_apply_to_all_losses() -> None:
    labels = PseudoLabels.numbered([0] * 12 + [1] * 12)
    camids = torch.tensor([0] * 12 + [0, 1] * 6)  # one camera, then two
    index = torch.tensor([0, 12])
    features = units(2, seed=4)

    def losses(mode: str, rows: list[int]) -> dict[str, Tensor]:
        method = build_method(
            "DCMIP", M, C, camera_weight=mode, margin=0.0, instance_epoch=0
        )
        method.prepare(Embeddings(units(M, seed=0)), camids, labels)
        return method.loss(Embeddings(features[rows]), index[rows], camids[index[rows]])

    two_cameras = losses("none", [1])
    for name, loss in losses("multi_camera", [0, 1]).items():
        torch.testing.assert_close(loss, two_cameras[name] / 2)
