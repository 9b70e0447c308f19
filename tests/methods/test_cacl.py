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
from selcon_plugin.losses import instance_contrastive_loss
from selcon_plugin.memory.instance import InstanceMemory
from selcon_plugin.methods import Method, build_method
from selcon_plugin.methods.cacl import gray_images

M, C = 24, 16
LABELS = [i // 5 if i < 20 else -1 for i in range(M)]  # 4 clusters of 5, 4 outliers
CAMIDS = torch.arange(M) % 3
BATCH = torch.tensor([0, 1, 21, 5, 6, 10])
TARGETS = [LABELS[i] for i in BATCH.tolist()]
units = units_of(C)


def make_method(**options: Any) -> Method:
    method = prepared_method("CACL", C, LABELS, CAMIDS, **options)
    method.gray_memory.fill(units(M, seed=1))  # as after some steps
    return method


def focal_in_loops(bank: Tensor, features: Tensor, gamma: float) -> float:
    losses = []
    for feature, target in zip(features.double(), TARGETS, strict=True):
        if target < 0:
            continue
        exps = []
        for k in range(4):
            members = [row for row, label in zip(bank, LABELS, strict=True) if label == k]
            similarities = [float(feature @ row.double()) for row in members]
            exps.append(math.exp(sum(similarities) / len(similarities) / 0.05))
        p = exps[target] / sum(exps)
        losses.append(-((1 - p) ** gamma) * math.log(p))
    return sum(losses) / len(losses)


def test_gray_images_are_their_luma(device: str) -> None:
    images = torch.zeros(3, 3, 2, 2, device=device)
    for channel in range(3):
        images[channel, channel] = 200.0
    gray = gray_images(images)
    assert gray.shape == images.shape
    for image, weight in zip(gray, (0.299, 0.587, 0.114), strict=True):
        assert torch.allclose(image, torch.full_like(image, 200.0 * weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_gray_images_stay_as_they_are(dtype: torch.dtype) -> None:
    shades = torch.arange(256, dtype=dtype).view(1, 1, 16, 16).expand(2, 3, -1, -1)
    (view,) = make_method().make_views(shades)
    assert torch.equal(view, shades.float())


def test_loss_equals_its_definition() -> None:
    method = make_method(gray_feature_weight=0.5, gray_cluster_weight=2.0)
    color, gray = units(len(BATCH), seed=3), units(len(BATCH), seed=4)
    losses = method.loss(Embeddings(color), BATCH, CAMIDS[BATCH], Embeddings(gray))
    to_feature = [float(a @ b) for a, b in zip(color, gray, strict=True)]
    to_cluster = []
    for feature, target in zip(color, TARGETS, strict=True):
        if target >= 0:
            mean = method.gray_memory.bank[5 * target : 5 * target + 5].mean(dim=0)
            to_cluster.append(float(feature @ mean / mean.norm()))
    wanted = {
        "loss_color": focal_in_loops(method.memory.bank, color, 4.0),
        "loss_gray": focal_in_loops(method.gray_memory.bank, gray, 4.0),
        "loss_gray_feature": -0.5 * sum(to_feature) / len(to_feature),
        "loss_gray_cluster": -2.0 * sum(to_cluster) / len(to_cluster),
    }
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        wanted, rel=1e-4
    )


def test_without_focal_factor_each_view_has_the_loss_of_spcl() -> None:
    """Contrast with the mean over the members in an instance memory."""
    method = make_method(focal_gamma=0.0)
    color, gray = units(len(BATCH), seed=3), units(len(BATCH), seed=4)
    losses = method.loss(Embeddings(color), BATCH, CAMIDS[BATCH], Embeddings(gray))
    views = {
        "loss_color": (color, method.memory.bank),
        "loss_gray": (gray, method.gray_memory.bank),
    }
    for name, (features, bank) in views.items():
        wanted = instance_contrastive_loss(
            features, bank, method.labels, torch.tensor(TARGETS), own="mean", others="mean"
        )
        assert losses[name].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_only_the_color_view_gets_the_consistency_gradient() -> None:
    method = make_method()
    color = units(len(BATCH), seed=3).requires_grad_()
    gray = units(len(BATCH), seed=4).requires_grad_()
    losses = method.loss(Embeddings(color), BATCH, CAMIDS[BATCH], Embeddings(gray))
    (losses["loss_gray_feature"] + losses["loss_gray_cluster"]).backward()
    assert gray.grad is None
    assert color.grad is not None
    assert color.grad.any()
    color.grad = None
    losses["loss_gray"].backward()
    assert color.grad is None
    assert gray.grad is not None


def test_feature_loss_of_equal_views_is_minus_1() -> None:
    method = make_method()
    gray = units(len(BATCH), seed=4)
    losses = method.loss(Embeddings(gray), BATCH, CAMIDS[BATCH], Embeddings(gray))
    assert losses["loss_gray_feature"].item() == pytest.approx(-1.0)


@pytest.mark.parametrize("parts", [[6], [4, 2]])
def test_each_view_writes_its_own_memory(parts: list[int]) -> None:
    method = make_method()
    color, gray = units(len(BATCH), seed=3), units(len(BATCH), seed=4)
    wanted = []
    for bank, features in ((0, color), (1, gray)):
        memory = InstanceMemory(M, C, momentum=0.2)
        memory.fill(units(M, seed=bank))
        memory.update(BATCH, features)
        wanted.append(memory.bank)
    stale = Embeddings(units(3, seed=9))  # from a skipped step
    method.loss(stale, BATCH[:3], CAMIDS[:3], stale)
    assert [size for size, _ in method.take_memos()] == [3]
    pieces = zip(*(t.split(parts) for t in (color, gray, BATCH)), strict=True)
    for one, other, index in pieces:
        method.loss(Embeddings(one), index, CAMIDS[index], Embeddings(other))
    method.update(BATCH, Embeddings(color))
    assert torch.equal(method.memory.bank, wanted[0])
    assert torch.equal(method.gray_memory.bank, wanted[1])
    with pytest.raises(RuntimeError, match="must follow loss"):
        method.update(BATCH, Embeddings(color))


def test_memories_start_from_the_first_features_and_persist() -> None:
    method = build_method("CACL", M, C)
    assert method.clustering_features() is None
    first = units(M, seed=0)
    method.prepare(Embeddings(first), CAMIDS, PseudoLabels.numbered(LABELS))
    assert torch.allclose(method.memory.bank, first)
    assert torch.equal(method.gray_memory.bank, method.memory.bank)
    clustered = method.clustering_features()
    assert clustered is method.memory.bank
    labels = PseudoLabels.numbered([i // 4 for i in range(M)])
    method.prepare(Embeddings(units(M, seed=7)), CAMIDS, labels)
    assert torch.equal(method.labels, labels.labels)
    assert torch.allclose(method.memory.bank, first)


@pytest.mark.parametrize("count", [0, 2])
def test_another_number_of_views_is_refused(count: int) -> None:
    method = make_method()
    view = Embeddings(units(len(BATCH), seed=3))
    with pytest.raises(ValueError, match=f"got {count} further views: .* make_views"):
        method.loss(view, BATCH, CAMIDS[BATCH], *[view] * count)


def test_checkpoints_of_version_0_1_load() -> None:
    method = build_method("CACL", 6, 4)
    state = {
        f"model.{key}".replace("gray_memory", "grey_memory"): torch.full_like(value, 2)
        for key, value in method.state_dict().items()
    }
    assert "model.grey_memory.bank" in state
    around = torch.nn.ModuleDict({"model": method})
    around.load_state_dict(state)
    assert (method.gray_memory.bank == 2).all()
