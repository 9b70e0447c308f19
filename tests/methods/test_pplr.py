from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.features import units
from selcon_plugin.clustering import PseudoLabels
from selcon_plugin.features import Embeddings
from selcon_plugin.losses import softmax_triplet_loss
from selcon_plugin.memory.cluster import ClusterMemory
from selcon_plugin.methods import Method, build_method, method_options, pplr
from selcon_plugin.methods.pplr import (
    agreement_smoothed_loss,
    cross_agreement,
    refined_targets,
)

M, C, S, D, K = 24, 16, 3, 5, 4
LABELS = [i // 5 if i < 20 else -1 for i in range(M)]  # 4 clusters of 5, 4 outliers
CAMIDS = torch.arange(M) % 3
BATCH = torch.tensor([0, 1, 21, 5, 6, 10, 17, 2])
TARGETS = torch.tensor(LABELS)[BATCH]


def embeddings_of(count: int, *, seed: int) -> Embeddings:
    return Embeddings(units(count, C, seed=seed), units(count, S, D, seed=seed + 100))


def make_method(*, epoch: int = 0, **options: Any) -> Method:
    options.setdefault("num_agreement_neighbors", 5)
    method = build_method("PPLR", M, C, S, D, **options)
    method.prepare(embeddings_of(M, seed=0), CAMIDS, PseudoLabels.numbered(LABELS))
    method.start_epoch(epoch)
    return method


def agreement_in_loops(whole: Tensor, parts: Tensor, k: int) -> Tensor:
    def nearest(features: Tensor, i: int) -> set[int]:
        others = [j for j in range(len(features)) if j != i]
        others.sort(key=lambda j: -float(features[i] @ features[j]))
        return set(others[:k])

    rows = []
    for i in range(len(whole)):
        own = nearest(whole, i)
        lists = [nearest(parts[:, s], i) for s in range(parts.shape[1])]
        rows.append([len(own & other) / len(own | other) for other in lists])
    return torch.tensor(rows)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_cross_agreement_equals_its_definition(
    k: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pplr, "_ROWS", 7)  # chunks of unequal size
    whole, parts = embeddings_of(M, seed=1)
    assert parts is not None
    found = cross_agreement(whole.to(device), parts.to(device), num_neighbors=k).cpu()
    assert torch.allclose(found, agreement_in_loops(whole, parts, k))


def test_equal_part_and_global_features_agree_fully() -> None:
    whole = units(M, C, seed=1)
    parts = torch.stack([whole, -whole], dim=1)
    # The opposite vectors have the same inner products and hence the same neighbors.
    assert torch.equal(cross_agreement(whole, parts), torch.ones(M, 2))


def test_few_images_are_neighbors_of_each_other() -> None:
    features = units(3, C, seed=1)
    assert torch.equal(cross_agreement(features, features[:, None]), torch.ones(3, 1))
    single = cross_agreement(features[:1], features[:1, None])
    assert torch.equal(single, torch.zeros(1, 1))


def test_refined_targets_equal_their_definition() -> None:
    logits = 3.0 * torch.randn(6, S, K, generator=torch.Generator().manual_seed(0))
    agreement = torch.rand(6, S, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([0, 3, 1, 1, 2, 0])
    found = refined_targets(targets, logits, agreement, part_weight=0.3)
    for i in range(6):
        shares = [math.exp(a) for a in agreement[i].tolist()]
        for k in range(K):
            opinion = sum(
                share / sum(shares) * math.exp(part[k]) / sum(math.exp(v) for v in part)
                for share, part in zip(shares, logits[i].tolist(), strict=True)
            )
            wanted = 0.7 * float(targets[i] == k) + 0.3 * opinion
            assert found[i, k].item() == pytest.approx(wanted, rel=1e-5)


def test_agreement_smooths_as_defined() -> None:
    logits = 3.0 * torch.randn(6, S, K, generator=torch.Generator().manual_seed(0))
    agreement = torch.rand(6, S, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([0, 3, 1, 1, 2, 0])
    found = agreement_smoothed_loss(logits, targets, agreement)
    for i in range(6):
        for s in range(S):
            total = sum(math.exp(v) for v in logits[i, s].tolist())
            q = [math.exp(v) / total for v in logits[i, s].tolist()]
            divergence = sum(math.log(1 / K / p) / K for p in q)
            a = agreement[i, s].item()
            wanted = -a * math.log(q[targets[i]]) + (1 - a) * divergence
            assert found[i, s].item() == pytest.approx(wanted, rel=1e-4)


def test_agreement_1_is_cross_entropy_and_0_is_divergence_from_uniform() -> None:
    logits = torch.randn(6, 1, K, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 3, 1, 1, 2, 0])
    full = agreement_smoothed_loss(logits, targets, torch.ones(6, 1))
    plain = F.cross_entropy(logits[:, 0], targets, reduction="none")
    assert torch.allclose(full[:, 0], plain)
    none = agreement_smoothed_loss(logits, targets, torch.zeros(6, 1))
    uniform = torch.full((6, K), 1 / K)
    divergence = F.kl_div(logits[:, 0].log_softmax(1), uniform, reduction="none").sum(1)
    assert torch.allclose(none[:, 0], divergence, atol=1e-6)
    even = agreement_smoothed_loss(torch.zeros(1, 1, K), targets[:1], torch.zeros(1, 1))
    assert even.item() == pytest.approx(0.0, abs=1e-6)


def logits_in_loops(bank: Tensor, features: Tensor) -> Tensor:
    rows = [[float(f @ row) / 0.05 for row in bank] for f in features]
    return torch.tensor(rows)


@pytest.mark.parametrize("epoch", [4, 5])
def test_loss_equals_its_definition(epoch: int) -> None:
    method = make_method(epoch=epoch)
    whole, parts = embeddings_of(len(BATCH), seed=3)
    assert parts is not None
    losses = method.loss(Embeddings(2.0 * whole, 3.0 * parts), BATCH, CAMIDS[BATCH])
    bank = method.part_memory.bank.view(K, S, D)
    logits = logits_in_loops(method.memory.bank, whole)
    part_logits = torch.stack(
        [logits_in_loops(bank[:, s], parts[:, s]) for s in range(S)], dim=1
    )
    agreement = agreement_in_loops(*embeddings_of(M, seed=0), 5)[BATCH]  # type: ignore[arg-type]
    global_loss = part_loss = 0.0
    inside = [i for i, target in enumerate(TARGETS.tolist()) if target >= 0]
    for i in inside:
        one = slice(i, i + 1)
        refined = refined_targets(TARGETS[one], part_logits[one], agreement[one])
        global_loss -= float((refined * logits[one].log_softmax(1)).sum())
        for s in range(S):
            log_prob = part_logits[i, s].log_softmax(0)
            onehot = F.one_hot(TARGETS[i], K)
            if epoch < 5:
                part_loss -= float((0.9 * onehot + 0.1 / K) @ log_prob) / S
            else:
                smoothed = agreement_smoothed_loss(
                    part_logits[one, s : s + 1], TARGETS[one], agreement[one, s : s + 1]
                )
                part_loss += float(smoothed) / S
    triplet = softmax_triplet_loss(whole, TARGETS, temperature=0.05)
    assert losses["loss_global"].item() == pytest.approx(
        global_loss / len(inside), rel=1e-4
    )
    assert losses["loss_part"].item() == pytest.approx(part_loss / len(inside), rel=1e-4)
    assert losses["loss_triplet"].item() == pytest.approx(triplet.item(), rel=1e-5)


def test_parts_refine_global_labels_but_not_vice_versa() -> None:
    method = make_method()
    whole, parts = embeddings_of(len(BATCH), seed=3)
    assert parts is not None
    whole.requires_grad_()
    parts.requires_grad_()
    losses = method.loss(Embeddings(whole, parts), BATCH, CAMIDS[BATCH])
    (losses["loss_global"] + losses["loss_triplet"]).backward(retain_graph=True)
    assert parts.grad is None
    assert whole.grad is not None
    before = whole.grad.clone()
    losses["loss_part"].backward()
    assert torch.equal(whole.grad, before)
    assert parts.grad is not None
    assert parts.grad.any()
    assert not parts.grad[2].any()  # the outlier
    assert not whole.grad[2].any()


def test_global_loss_without_part_refinement_equals_cluster_contrast() -> None:
    method = make_method(part_weight=0.0, triplet_weight=0.0)
    plain = build_method("ClusterContrast", M, C)
    plain.prepare(embeddings_of(M, seed=0), CAMIDS, PseudoLabels.numbered(LABELS))
    embeddings = embeddings_of(len(BATCH), seed=3)
    losses = method.loss(embeddings, BATCH, CAMIDS[BATCH])
    wanted = plain.loss(embeddings, BATCH, CAMIDS[BATCH])["loss_cluster"]
    assert set(losses) == {"loss_global", "loss_part"}
    assert losses["loss_global"].item() == pytest.approx(wanted.item(), rel=1e-5)
    for m in (method, plain):
        m.update(BATCH, embeddings)
    assert torch.equal(method.memory.bank, plain.memory.bank)


@pytest.mark.parametrize("update", ["mean", "hard"])
def test_each_part_has_a_memory_of_its_own(update: str) -> None:
    method = make_method(cluster_update=update)
    _, all_parts = embeddings_of(M, seed=0)
    embeddings = embeddings_of(len(BATCH), seed=3)
    assert all_parts is not None
    assert embeddings.part_features is not None
    method.loss(embeddings, BATCH, CAMIDS[BATCH])
    method.update(BATCH, embeddings)
    for s in range(S):
        means = torch.stack([all_parts[5 * k : 5 * k + 5, s].sum(dim=0) for k in range(K)])
        memory = ClusterMemory(means, momentum=0.1, update=update)  # type: ignore[arg-type]
        memory.update(embeddings.part_features[:, s], TARGETS)
        found = method.part_memory.bank.view(K, S, D)[:, s]
        assert torch.allclose(found, memory.bank, atol=1e-6)


def test_agreement_is_recomputed_with_the_clusters_and_saved() -> None:
    method = make_method()
    before = method.agreement.clone()
    embeddings = embeddings_of(M, seed=9)
    method.prepare(embeddings, CAMIDS, PseudoLabels.numbered(LABELS))
    assert not torch.equal(method.agreement, before)
    mean = method.agreement.mean().item()
    assert method.diagnostics()["cross_agreement"] == pytest.approx(mean)
    fresh = build_method("PPLR", M, C, S, D)
    fresh.load_state_dict(method.state_dict())
    assert torch.equal(fresh.agreement, method.agreement)


def test_missing_parts_are_reported() -> None:
    with pytest.raises(ValueError, match=r"num_parts=0: set MODEL.SELCON.NUM_PARTS to 1"):
        build_method("PPLR", M, C)
    method = build_method("PPLR", M, C, S, D)
    with pytest.raises(ValueError, match="PPLR needs part features"):
        method.prepare(Embeddings(units(M, C, seed=0)), None, PseudoLabels.numbered(LABELS))


def test_only_the_global_feature_is_used_at_test_time() -> None:
    """The host adapter selects its test feature by the option of this name."""
    assert method_options("PPLR")["global_distance_weight"].default == 1.0
