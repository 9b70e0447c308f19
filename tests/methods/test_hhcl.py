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
from selcon_plugin.methods import Method, build_method
from selcon_plugin.methods.hhcl import HHCL, fill_slots

GOLDEN = Path(__file__).parents[1] / "golden" / "cluster_memory.npz"
M, C = 24, 8
LABELS = [i // 5 if i < 20 else -1 for i in range(M)]  # 4 clusters of 5, 4 outliers
BATCH = torch.tensor([0, 1, 2, 5, 6, 10, 21, 7])  # 3, 3 and 1 images, an outlier
CAMIDS = torch.arange(M) % 3
units = units_of(C)


def make_method(name: str = "HHCL", device: str = "cpu", **options: Any) -> Method:
    return prepared_method(name, C, LABELS, device=device, **options)


def make_hhcl(device: str = "cpu", **options: Any) -> HHCL:
    method = make_method("HHCL", device, **options)
    assert isinstance(method, HHCL)
    return method


def log_loss(logits: list[float], target: int, temperature: float) -> float:
    total = math.log(sum(math.exp(logit / temperature) for logit in logits))
    return total - logits[target] / temperature


def mean_loss_in_loops(bank: Tensor, features: Tensor, temperature: float) -> float:
    losses = [
        log_loss([float(feature @ row) for row in bank], LABELS[i], temperature)
        for feature, i in zip(features, BATCH.tolist(), strict=True)
        if LABELS[i] >= 0
    ]
    return sum(losses) / len(losses)


def slot_loss_in_loops(slots: Tensor, features: Tensor, temperature: float) -> float:
    """Compute the loss by loops for slots ``(clusters, S, C)``."""
    losses = []
    for feature, i in zip(features, BATCH.tolist(), strict=True):
        if LABELS[i] >= 0:
            similarity = [[float(feature @ row) for row in own] for own in slots]
            logits = [
                min(values) if k == LABELS[i] else max(values)
                for k, values in enumerate(similarity)
            ]
            losses.append(log_loss(logits, LABELS[i], temperature))
    return sum(losses) / len(losses)


def test_prototype_loss_equals_its_definition(device: str) -> None:
    method = make_hhcl(device, temperature=0.1, bank_momentum=0.3)
    all_features = units(M, seed=0)
    means = torch.stack([all_features[5 * k : 5 * k + 5].mean(dim=0) for k in range(4)])
    mean_rows = F.normalize(means, dim=1)
    hard_rows = mean_rows.clone()
    for seed in (1, 2):
        features = units(len(BATCH), seed=seed)
        embeddings = Embeddings(features.to(device))
        losses = method.loss(embeddings, BATCH.to(device), None)
        for name, rows in (("loss_mean", mean_rows), ("loss_hard", hard_rows)):
            wanted = 0.5 * mean_loss_in_loops(rows, features, 0.1)
            assert losses[name].item() == pytest.approx(wanted, rel=1e-5)
        method.update(BATCH.to(device), embeddings)
        for k in range(3):
            own = [features[b] for b, i in enumerate(BATCH.tolist()) if LABELS[i] == k]
            hard = min(own, key=lambda f, k=k: float(f @ hard_rows[k]))  # type: ignore[misc]
            mean = torch.stack(own).mean(dim=0)
            hard_rows[k] = F.normalize(0.3 * hard_rows[k] + 0.7 * hard, dim=0)
            mean_rows[k] = F.normalize(0.3 * mean_rows[k] + 0.7 * mean, dim=0)
        close = {"rtol": 0.0, "atol": 1e-6}
        torch.testing.assert_close(method.hard_memory.bank.cpu(), hard_rows, **close)
        torch.testing.assert_close(method.mean_memory.bank.cpu(), mean_rows, **close)


def test_instance_loss_equals_its_definition(device: str) -> None:
    method = make_hhcl(device, form="instances", instance_slots=3, temperature=0.1)
    all_features = units(M, seed=0)
    # Three of five images are used: numbers 0, 5 / 3 and 10 / 3, rounded down.
    slots = torch.stack([all_features[[5 * k, 5 * k + 1, 5 * k + 3]] for k in range(4)])
    for seed in (1, 2):
        torch.testing.assert_close(method.slots.bank.cpu().reshape(4, 3, C), slots)
        features = units(len(BATCH), seed=seed)
        embeddings = Embeddings(features.to(device))
        mean_rows = method.mean_memory.bank.cpu().clone()
        losses = method.loss(embeddings, BATCH.to(device), None)
        wanted = 0.5 * slot_loss_in_loops(slots, features, 0.1)
        assert losses["loss_hard"].item() == pytest.approx(wanted, rel=1e-5)
        wanted = 0.5 * mean_loss_in_loops(mean_rows, features, 0.1)
        assert losses["loss_mean"].item() == pytest.approx(wanted, rel=1e-5)
        method.update(BATCH.to(device), embeddings)
        slots[0] = features[[0, 1, 2]]
        slots[1] = features[[3, 4, 7]]
        slots[2] = features[[5, 5, 5]]


@pytest.mark.parametrize("num_slots", [1, 2, 3, 5, 8])
def test_slots_are_filled_evenly(num_slots: int, device: str) -> None:
    labels = [3, 0, -1, 3, 5, 3, 0, -1, 3, 3]
    rows, images = fill_slots(torch.tensor(labels, device=device), num_slots)
    wanted = []
    for k in (0, 3, 5):
        own = [i for i, label in enumerate(labels) if label == k]
        for s in range(num_slots):
            wanted.append((k * num_slots + s, own[s * len(own) // num_slots]))
    assert list(zip(rows.tolist(), images.tolist(), strict=True)) == wanted


@pytest.mark.parametrize(
    ("options", "momentum"),
    [
        ({}, 0.1),
        # A slot is overwritten, which corresponds to momentum 0 for its only image.
        ({"form": "instances", "instance_slots": 1, "bank_momentum": 0.0}, 0.0),
    ],
)
def test_one_instance_per_cluster_equals_cluster_contrast(
    options: dict[str, Any], momentum: float
) -> None:
    labels = PseudoLabels.numbered([0, 1, 2, 3] + [-1] * (M - 4))
    found = make_hhcl(**options)
    wanted = make_method("ClusterContrast", bank_momentum=momentum)
    for method in (found, wanted):
        method.prepare(Embeddings(units(M, seed=0)), None, labels)
    for seed in range(3):
        index = torch.tensor([2, 0, 1])
        embeddings = Embeddings(units(3, seed=seed))
        hybrid = sum(found.loss(embeddings, index, None).values())
        plain = wanted.loss(embeddings, index, None)["loss_cluster"]
        torch.testing.assert_close(hybrid, plain)
        for method in (found, wanted):
            method.update(index, embeddings)
    torch.testing.assert_close(found.mean_memory.bank, wanted.memory.bank)


def test_instance_level_labels_have_one_slot() -> None:
    method = make_hhcl(form="instances", instance_slots=4)
    method.prepare(Embeddings(units(M, seed=0)), None, PseudoLabels.each_its_own(M))
    assert method.slots.bank.shape == (M, C)
    features = Embeddings(units(len(BATCH), seed=1))
    losses = method.loss(features, BATCH, None)
    assert losses["loss_hard"] == pytest.approx(losses["loss_mean"].item(), rel=1e-5)
    method.update(BATCH, features)
    torch.testing.assert_close(method.slots.bank[BATCH], features.global_features)


def test_camera_weights_apply_to_both_losses() -> None:
    for form in ("prototypes", "instances"):
        method = build_method("HHCL", M, C, form=form, camera_weight="multi_camera")
        camids = torch.tensor([0] * 5 + [0, 1, 0, 1, 0] + [2] * 14)
        method.prepare(Embeddings(units(M, seed=0)), camids, PseudoLabels.numbered(LABELS))
        features = Embeddings(units(2, seed=1))
        for first, positive in ((0, False), (5, True)):  # one camera, two cameras
            index = torch.tensor([first, first + 1])
            losses = method.loss(features, index, camids[index])
            assert all((loss > 0) == positive for loss in losses.values()), form


def test_weights_of_the_release_are_refused_with_slots() -> None:
    with pytest.raises(ValueError, match="released_weights are those of form 'prototypes'"):
        make_method(form="instances", released_weights=True)


@pytest.mark.parametrize("form", ["prototypes", "instances"])
def test_released_code(form: str) -> None:
    with np.load(GOLDEN) as arrays:
        golden = {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays}
    name = "hhcl_CMhybrid" if form == "prototypes" else "hhcl_CMhybrid_v2"
    start, after = golden[f"{name}_init"], golden[f"{name}_after"]
    method = HHCL(
        200,
        48,
        form=form,
        instance_slots=8,
        released_weights=form == "prototypes",
        bank_momentum=golden["momentum"].item(),
        temperature=golden["temp"].item(),
    )
    method.prepare(
        Embeddings(golden["features"]), None, PseudoLabels.numbered(golden["labels"])
    )
    method.labels[:32] = golden["targets"]  # recorded for a batch and not for images
    method._read_labels()
    if form == "prototypes":  # recorded: hard rows, mean rows
        method.hard_memory.reset(start[:14])
        method.mean_memory.reset(start[14:])
    else:  # recorded: centroids, then the first slot of each cluster, the second, ...
        method.mean_memory.reset(start[:14])
        method.slots.reset(start[14:].reshape(8, 14, 48).transpose(0, 1).reshape(-1, 48))
    index = torch.arange(32)
    features = golden["inputs"].requires_grad_()
    unit = F.normalize(features, dim=1)
    loss = torch.stack(list(method.loss(Embeddings(unit), index, None).values())).sum()
    recorded = golden[f"{name}_loss"].item()
    assert loss.item() == pytest.approx(recorded, rel=0, abs=1e-5)
    # The recorded gradient is with respect to unit vectors.
    found, wanted = (
        torch.autograd.grad(out, features, grad, retain_graph=True)[0]
        for out, grad in ((loss, None), (unit, golden[f"{name}_grad"]))
    )
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    method.update(index, Embeddings(unit))
    if form == "prototypes":
        banks = torch.cat([method.hard_memory.bank, method.mean_memory.bank])
    else:
        slots = method.slots.bank.reshape(14, 8, 48).transpose(0, 1).reshape(-1, 48)
        banks = torch.cat([method.mean_memory.bank, slots])
    torch.testing.assert_close(banks, after, rtol=0, atol=1e-5)
