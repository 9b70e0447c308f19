"""Parity with arrays recorded from the methods' released code (tests/golden).

Recorded part arrays are parts-first; tolerances are those of the recording.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selcon_plugin.distance import fused_distance
from selcon_plugin.features import Embeddings
from selcon_plugin.losses import (
    cluster_contrastive_loss,
    positive_weights,
    selective_contrastive_loss,
)
from selcon_plugin.losses import selective_contrastive as loss_module
from selcon_plugin.memory.cluster import ClusterMemory
from selcon_plugin.memory.tri_bank import TriBankMemory
from selcon_plugin.memory.writes import write_rows
from selcon_plugin.methods import build_method
from selcon_plugin.methods.selective_contrastive import SelectiveContrastive
from selcon_plugin.selection import select_neighbors

GOLDEN = Path(__file__).parent / "golden"
PARTS_FIRST = ("local_before", "local_after", "local_features", "grad_local")


@pytest.fixture(params=["small", "paper", "clamped"])
def golden(request: pytest.FixtureRequest) -> SimpleNamespace:
    with np.load(GOLDEN / f"scl_{request.param}.npz") as arrays:
        case: dict[str, Any] = {name: torch.from_numpy(arrays[name]) for name in arrays}
    for name in PARTS_FIRST:
        case[name] = case[name].transpose(0, 1).contiguous()
    names = ("K", "N", "lambda_g", "lambda_c", "lambda_t", "lambda_p", "alpha", "t")
    case["hyper"] = dict(zip(names, case["hyper"].tolist(), strict=True))
    return SimpleNamespace(**case)


def golden_distance(golden: SimpleNamespace) -> Tensor:
    return fused_distance(
        golden.global_features,
        golden.local_features,
        golden.cameras[golden.index],
        golden.global_before,
        golden.local_before,
        golden.cameras,
        global_distance_weight=golden.hyper["lambda_g"],
        same_camera_penalty=golden.hyper["lambda_c"],
    )


def assert_same_rows(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert torch.equal(found.sort(dim=1).values, expected.sort(dim=1).values)


def assert_close_in_norm(
    found: Tensor | None, expected: Tensor, tolerance: float = 1e-6
) -> None:
    assert found is not None
    assert (found - expected).norm() <= tolerance * expected.norm()


def make_memory(golden: SimpleNamespace) -> TriBankMemory:
    num_images, num_parts, part_dim = golden.local_before.shape
    memory = TriBankMemory(num_images, golden.global_before.shape[1], num_parts, part_dim)
    memory.initialize(golden.global_before, golden.local_before)
    memory.mixture_bank.copy_(golden.mixture_before)
    return memory


def assert_banks_as_recorded(memory: TriBankMemory, golden: SimpleNamespace) -> None:
    close = {"rtol": 0.0, "atol": 1e-5}
    torch.testing.assert_close(memory.global_bank, golden.global_after, **close)
    torch.testing.assert_close(memory.part_bank, golden.local_after, **close)
    torch.testing.assert_close(memory.mixture_bank, golden.mixture_after, **close)


def test_distance(golden: SimpleNamespace) -> None:
    torch.testing.assert_close(
        golden_distance(golden), golden.distance, rtol=0.0, atol=1e-5
    )


@pytest.mark.parametrize("source", ["recorded distance", "own distance"])
def test_selection(golden: SimpleNamespace, source: str) -> None:
    recorded = source == "recorded distance"
    distance = golden.distance if recorded else golden_distance(golden)
    positives, negatives = select_neighbors(
        distance,
        golden.index,
        num_neighbors=int(golden.hyper["K"]),
        num_negatives=int(golden.hyper["N"]),
    )
    assert torch.equal(positives, golden.positives)
    assert_same_rows(negatives, golden.negatives)


@pytest.mark.parametrize("path", ["default", "gather", "dense"])
def test_losses_and_gradients(
    golden: SimpleNamespace, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path != "default":
        monkeypatch.setattr(loss_module, "_MAX_DOUBLE_VALUES", 0)
        rows = 0.0 if path == "gather" else 1e9
        monkeypatch.setattr(loss_module, "_rows_per_candidate", lambda batch_size: rows)
    hyper = golden.hyper
    global_features = golden.global_features.requires_grad_()
    part_features = golden.local_features.requires_grad_()
    weights = positive_weights(
        golden.positives.shape[1],
        self_weight=hyper["lambda_t"],
        neighbor_scale=hyper["alpha"],
    )
    loss_global, loss_part = (
        selective_contrastive_loss(
            features,
            golden.mixture_before,
            golden.positives,
            golden.negatives,
            positive_weight=weights,
            temperature=1.0 / hyper["t"],
        )
        for features in (global_features, part_features.flatten(1))
    )
    loss = (1.0 - hyper["lambda_p"]) * loss_global + hyper["lambda_p"] * loss_part
    assert loss_global.item() == pytest.approx(golden.loss_global.item(), rel=0, abs=1e-5)
    assert loss_part.item() == pytest.approx(golden.loss_local.item(), rel=0, abs=1e-5)
    assert loss.item() == pytest.approx(golden.loss.item(), rel=0, abs=1e-5)
    if path == "default":  # beyond toy sizes logits are float32, good to about 2e-6
        loss.backward()
        assert_close_in_norm(global_features.grad, golden.grad_global)
        assert_close_in_norm(part_features.grad, golden.grad_local)


def test_write_order_of_the_mixture_bank(golden: SimpleNamespace) -> None:
    bank = golden.mixture_before.clone()
    batch_size = len(golden.index)
    num_columns = golden.positives.shape[1]
    # Parts are written first; every column of positives writes the whole batch.
    branch = torch.arange(2).repeat_interleave(num_columns * batch_size) * batch_size
    source = branch + torch.arange(batch_size).repeat(2 * num_columns)
    features = torch.cat([golden.local_features.flatten(1), golden.global_features])
    write_rows(bank, golden.update_order.flatten(), features, source, momentum=0.5)
    torch.testing.assert_close(bank, golden.mixture_after, rtol=0.0, atol=1e-5)


def test_banks(golden: SimpleNamespace) -> None:
    memory = make_memory(golden)
    memory.update(
        golden.index, golden.global_features, golden.local_features, golden.positives
    )
    assert_banks_as_recorded(memory, golden)


def test_whole_step_of_the_method(golden: SimpleNamespace) -> None:
    hyper = golden.hyper
    num_images, num_parts, part_dim = golden.local_before.shape
    method = build_method(
        "SelectiveContrastive",
        num_images,
        golden.global_before.shape[1],
        num_parts,
        part_dim,
        num_neighbors=int(hyper["K"]),
        num_negatives=int(hyper["N"]),
        self_weight=hyper["lambda_t"],
        neighbor_scale=hyper["alpha"],
        part_loss_weight=hyper["lambda_p"],
        global_distance_weight=hyper["lambda_g"],
        same_camera_penalty=hyper["lambda_c"],
        temperature=1.0 / hyper["t"],
    )
    assert isinstance(method, SelectiveContrastive)
    method.prepare(Embeddings(golden.global_before, golden.local_before), golden.cameras)
    method.memory.mixture_bank.copy_(golden.mixture_before)
    method.start_epoch(method.warmup_epochs)
    embeddings = Embeddings(
        golden.global_features.requires_grad_(), golden.local_features.requires_grad_()
    )
    camids = golden.cameras[golden.index]
    positives, negatives = method.select(embeddings, golden.index, camids)[:2]
    assert torch.equal(positives, golden.positives)
    assert_same_rows(negatives, golden.negatives)

    losses = method.loss(embeddings, golden.index, camids)
    loss = losses["loss_global"] + losses["loss_part"]
    weighted_global = (1.0 - hyper["lambda_p"]) * golden.loss_global.item()
    weighted_part = hyper["lambda_p"] * golden.loss_local.item()
    assert losses["loss_global"].item() == pytest.approx(weighted_global, rel=0, abs=1e-5)
    assert losses["loss_part"].item() == pytest.approx(weighted_part, rel=0, abs=1e-5)
    assert loss.item() == pytest.approx(golden.loss.item(), rel=0, abs=1e-5)
    loss.backward()
    assert_close_in_norm(embeddings.global_features.grad, golden.grad_global)
    assert embeddings.part_features is not None
    assert_close_in_norm(embeddings.part_features.grad, golden.grad_local)

    method.update(golden.index, embeddings)
    assert_banks_as_recorded(method.memory, golden)


@pytest.fixture
def clusters() -> SimpleNamespace:
    with np.load(GOLDEN / "cluster_memory.npz") as arrays:
        case: dict[str, Any] = {name: torch.from_numpy(arrays[name]) for name in arrays}
    case["momentum"], case["temp"] = case["momentum"].item(), case["temp"].item()
    return SimpleNamespace(**case)


@pytest.mark.parametrize("update", ["mean", "hard"])
def test_cluster_contrast(clusters: SimpleNamespace, update: str) -> None:
    memory = ClusterMemory(
        clusters.centroids,
        momentum=clusters.momentum,
        update=update,  # type: ignore[arg-type]
    )
    features = clusters.inputs.requires_grad_()  # of any length
    loss = cluster_contrastive_loss(
        features, memory.bank, clusters.targets, temperature=clusters.temp
    )
    loss.backward()
    memory.update(features, clusters.targets)
    recorded = {
        name: getattr(clusters, f"cc_{update}_{name}") for name in ("loss", "grad", "after")
    }
    assert loss.item() == pytest.approx(recorded["loss"].item(), rel=0, abs=1e-5)
    assert_close_in_norm(features.grad, recorded["grad"], tolerance=1e-5)
    torch.testing.assert_close(memory.bank, recorded["after"], rtol=0.0, atol=1e-5)


def test_hard_sample_hybrid_contrast(clusters: SimpleNamespace) -> None:
    # Two banks: one follows the hardest image of each cluster, the other the batch mean.
    start = clusters.hhcl_CMhybrid_init.chunk(2)
    after = clusters.hhcl_CMhybrid_after.chunk(2)
    features = F.normalize(clusters.inputs, dim=1).requires_grad_()
    losses = []
    for rows, expected, update in zip(start, after, ("hard", "batch_mean"), strict=True):
        memory = ClusterMemory(rows, momentum=clusters.momentum, update=update)  # type: ignore[arg-type]
        losses.append(
            cluster_contrastive_loss(
                features, memory.bank, clusters.targets, temperature=clusters.temp
            )
        )
        memory.update(features, clusters.targets)
        torch.testing.assert_close(memory.bank, expected, rtol=0.0, atol=1e-5)
    loss = 0.5 * (losses[0] + 0.5 * losses[1])  # the release's misplaced bracket
    recorded = clusters.hhcl_CMhybrid_loss.item()
    assert loss.item() == pytest.approx(recorded, rel=0, abs=1e-5)
