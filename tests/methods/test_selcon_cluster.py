from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from helpers.features import units
from selcon_plugin.clustering import DBSCANLabeler, PseudoLabels
from selcon_plugin.features import Embeddings
from selcon_plugin.methods import build_method
from selcon_plugin.methods.selcon_cluster import SelConCluster
from selcon_plugin.methods.selective_contrastive import SelectiveContrastive

M, S, D = 30, 2, 4
C = S * D
LABELS = [i // 6 if i < 24 else -1 for i in range(M)]  # 4 clusters of 6, 6 outliers
CAMIDS = torch.arange(M) % 3


def embeddings_of(count: int, *, seed: int, parts: bool = False) -> Embeddings:
    part_features = units(count, S, D, seed=seed + 1000) if parts else None
    return Embeddings(units(count, C, seed=seed), part_features)


def make_method(
    name: str = "SelConCluster",
    *,
    parts: bool = False,
    labels: PseudoLabels | None = None,
    **options: Any,
) -> SelectiveContrastive:
    sizes = (S, D) if parts else (0, 0)
    settings = {"num_neighbors": 3, "num_negatives": 8, "warmup_epochs": 0} | options
    method = build_method(name, M, C, *sizes, **settings)
    assert isinstance(method, SelectiveContrastive)
    labels = PseudoLabels.numbered(LABELS) if labels is None else labels
    method.prepare(embeddings_of(M, seed=0, parts=parts), CAMIDS, labels)
    return method


def test_equals_selective_contrast_with_other_defaults() -> None:
    assert issubclass(SelConCluster, SelectiveContrastive)
    method = build_method("SelConCluster", M, C)
    assert method.needs_clusters
    assert method.default_sampler == "pk_camera"


def test_mixture_starts_between_own_feature_and_cluster_mean() -> None:
    features = units(M, C, seed=0)
    for weight in (0.0, 0.3, 1.0):
        bank = make_method(center_weight=weight).memory.mixture_bank
        mean = F.normalize(features[6:12].mean(dim=0), dim=0)
        wanted = F.normalize((1 - weight) * features[7] + weight * mean, dim=0)
        assert torch.allclose(bank[7], wanted, atol=1e-6)
        assert torch.allclose(bank[27], features[27], atol=1e-6)  # an outlier


def test_mixture_is_reinitialized_by_every_clustering() -> None:
    method = make_method()
    index = torch.tensor([0, 6])
    embeddings = embeddings_of(2, seed=5)
    method.loss(embeddings, index, CAMIDS[index])
    method.update(index, embeddings)
    method.prepare(embeddings_of(M, seed=8), CAMIDS, PseudoLabels.numbered(LABELS))
    fresh = build_method("SelConCluster", M, C)
    fresh.prepare(embeddings_of(M, seed=8), CAMIDS, PseudoLabels.numbered(LABELS))
    assert isinstance(fresh, SelConCluster)
    assert torch.equal(method.memory.mixture_bank, fresh.memory.mixture_bank)


def test_plain_selcon_keeps_its_mixture_at_the_next_clustering() -> None:
    method = make_method("SelectiveContrastive", selection="cluster")
    index = torch.tensor([0, 6])
    embeddings = embeddings_of(2, seed=5)
    method.loss(embeddings, index, CAMIDS[index])
    method.update(index, embeddings)
    before = method.memory.mixture_bank.clone()
    assert before.any()
    method.prepare(embeddings_of(M, seed=8), CAMIDS, PseudoLabels.numbered(LABELS))
    assert torch.equal(method.memory.mixture_bank, before)
    assert torch.equal(method.memory.global_bank, units(M, C, seed=8))


@pytest.mark.parametrize("parts", [False, True])
def test_positives_stay_inside_the_cluster_and_negatives_outside(parts: bool) -> None:
    method = make_method(parts=parts)
    index = torch.tensor([0, 7, 23, 25])
    chosen = method.select(embeddings_of(4, seed=3, parts=parts), index, CAMIDS[index])
    labels = torch.tensor(LABELS)
    assert chosen.positive_mask is not None
    for row, own in enumerate(index.tolist()):
        positives = chosen.positive_index[row][chosen.positive_mask[row]]
        if LABELS[own] < 0:
            assert positives.tolist() == [own]
        else:
            assert len(positives) == 4
            assert (labels[positives] == LABELS[own]).all()
            assert (labels[chosen.negative_index[row]] != LABELS[own]).all()


def test_masked_positives_are_not_written() -> None:
    labels = PseudoLabels.numbered([0, 0] + [1] * 10 + [-1] * 18)
    method = make_method(labels=labels)
    before = method.memory.mixture_bank.clone()
    index = torch.tensor([0, 20])  # one other image in the cluster; none
    embeddings = embeddings_of(2, seed=3)
    losses = method.loss(embeddings, index, None)
    assert losses["loss_global"].isfinite()
    method.update(index, embeddings)
    written = (method.memory.mixture_bank != before).any(dim=1).nonzero().flatten()
    assert written.tolist() == [0, 1, 20]


def test_diagnostics_use_only_existing_neighbors() -> None:
    labels = PseudoLabels.numbered([0, 0] + [1] * 10 + [-1] * 18)
    method = make_method(labels=labels)
    index = torch.tensor([0, 2, 20])
    method.loss(embeddings_of(3, seed=3), index, None)
    selected = method.selected_positives()
    assert selected is not None
    anchors, neighbors = selected
    assert anchors.tolist() == [0, 2, 2, 2]
    assert neighbors.shape == (4, 1)
    assert (method.labels[neighbors[:, 0]] == method.labels[anchors]).all()
    assert method.diagnostics()["neighbor_similarity"] <= 1.0


def test_jaccard_selection_ranks_by_the_graph_and_the_camera() -> None:
    features = F.normalize(
        units(5, C, seed=1).repeat_interleave(6, dim=0) + 0.3 * units(M, C, seed=2), dim=1
    )
    labels = DBSCANLabeler(eps=0.7, min_samples=2, k1=8, k2=2)(features)
    penalty = 0.05
    method = build_method(
        "SelectiveContrastive",
        M,
        C,
        selection="jaccard",
        num_neighbors=3,
        num_negatives=5,
        warmup_epochs=0,
        same_camera_penalty=penalty,
    )
    assert isinstance(method, SelectiveContrastive)
    method.prepare(Embeddings(features), CAMIDS, labels)
    index = torch.tensor([0, 13])
    chosen = method.select(Embeddings(features[index]), index, CAMIDS[index])
    dense = labels.distance.toarray()
    dense[dense == 0] = 1.0
    for row, own in enumerate(index.tolist()):
        ranked = sorted(
            (dense[own, j] + penalty * bool(CAMIDS[j] == CAMIDS[own]), j)
            for j in range(M)
            if j != own and dense[own, j] < 1
        )
        wanted = [j for _, j in ranked[:3]]
        assert chosen.positive_index[row].tolist() == [own, *wanted]


@pytest.mark.parametrize("cameras", ["own", "unbiased"])
def test_without_clusters_the_nearest_images_are_positives(cameras: str) -> None:
    labels = PseudoLabels.each_its_own(M)
    method = make_method(labels=labels, negative_cameras=cameras)
    plain = build_method(
        "SelectiveContrastive",
        *(M, C),
        num_neighbors=3,
        num_negatives=8,
        warmup_epochs=0,
        negative_cameras=cameras,
    )
    assert isinstance(plain, SelectiveContrastive)
    plain.prepare(embeddings_of(M, seed=0), CAMIDS)
    index = torch.tensor([0, 7])
    batch = embeddings_of(2, seed=3)
    chosen = method.select(batch, index, CAMIDS[index])
    wanted = plain.select(batch, index, CAMIDS[index])
    assert torch.equal(chosen.positive_index, wanted.positive_index)
    assert torch.equal(chosen.negative_index, wanted.negative_index)
    assert chosen.positive_mask is None


@pytest.mark.parametrize("selection", ["cluster", "distance"])
def test_negatives_of_the_own_camera_only(selection: str) -> None:
    camids = CAMIDS.clone()
    camids[13] = -1
    whole, own = (
        build_method(
            "SelectiveContrastive",
            *(M, C),
            selection=selection,
            num_neighbors=3,
            num_negatives=number,
            warmup_epochs=0,
            negative_cameras=cameras,
        )
        for cameras, number in (("all", M), ("own", 4))
    )
    assert isinstance(whole, SelectiveContrastive)
    assert isinstance(own, SelectiveContrastive)
    labels = DBSCANLabeler(eps=0.8, k1=6, k2=2)(units(M, C, seed=0))
    index = torch.tensor([0, 7, 13])
    batch = embeddings_of(3, seed=3)
    for method in (whole, own):
        method.prepare(embeddings_of(M, seed=0), camids, labels)
    anywhere = whole.select(batch, index, camids[index])
    chosen = own.select(batch, index, camids[index])
    assert torch.equal(chosen.positive_index, anywhere.positive_index)
    assert chosen.negative_mask is not None
    for row, camera in enumerate(camids[index].tolist()):
        ranked = anywhere.negative_index[row].tolist()
        if anywhere.negative_mask is not None:
            present = anywhere.negative_mask[row].tolist()
            ranked = [j for j, there in zip(ranked, present, strict=True) if there]
        wanted = [j for j in ranked if camera < 0 or camids[j] == camera][:4]
        assert wanted
        assert chosen.negative_index[row][chosen.negative_mask[row]].tolist() == wanted


@pytest.mark.parametrize("cameras", ["all", "unbiased"])
def test_unbiased_negatives_mask_camera_confounded_pairs(cameras: str) -> None:
    camids = CAMIDS.clone()
    camids[13] = -1
    method = make_method(negative_cameras=cameras, num_neighbors=5, num_negatives=M)
    method.prepare(embeddings_of(M, seed=0), camids, PseudoLabels.numbered(LABELS))
    index = torch.tensor([0, 7, 13])
    batch = embeddings_of(3, seed=3)
    found = method.loss(batch, index, camids[index])["loss_global"].item()

    bank = method.memory.mixture_bank.double()
    expected, left_out = 0.0, 0
    for own, feature in zip(index.tolist(), batch.global_features.double(), strict=True):
        logits = bank @ feature / 0.05
        positives = [j for j in range(M) if LABELS[j] == LABELS[own]]
        negatives = [j for j in range(M) if LABELS[j] != LABELS[own]]
        for p in positives:
            told = cameras == "unbiased" and camids[own] >= 0 and camids[p] == camids[own]
            counted = [n for n in negatives if not told or camids[n] == camids[own]]
            left_out += len(negatives) - len(counted)
            weight = 0.1 if p == own else 0.9 / (len(positives) - 1)
            total = torch.logsumexp(logits[positives + counted], dim=0)
            expected += weight * (total - logits[p]).item() / len(index)
    assert found == pytest.approx(expected, rel=1e-5)
    assert (left_out > 0) == (cameras == "unbiased")


def test_warm_up_masks_no_pairs() -> None:
    index = torch.tensor([0, 7])
    batch = embeddings_of(2, seed=3)
    found = [
        make_method(negative_cameras=cameras, warmup_epochs=1).loss(
            batch, index, CAMIDS[index]
        )["loss_global"]
        for cameras in ("all", "unbiased")
    ]
    assert found[0].equal(found[1])


def test_without_cameras_all_images_may_be_negatives() -> None:
    chosen = []
    for cameras in ("own", "unbiased", "all"):
        method = make_method(negative_cameras=cameras)
        method.prepare(embeddings_of(M, seed=0), None, PseudoLabels.numbered(LABELS))
        chosen.append(method.select(embeddings_of(2, seed=3), torch.tensor([0, 7]), None))
    assert torch.equal(chosen[0].negative_index, chosen[2].negative_index)
    assert torch.equal(chosen[1].negative_index, chosen[2].negative_index)


def test_camera_weight_needs_clusters() -> None:
    with pytest.raises(ValueError, match=r"camera_weight 'cluster' needs clusters"):
        build_method("SelectiveContrastive", M, C, camera_weight="cluster")


def test_micro_batches_are_written_as_one() -> None:
    whole, parts = make_method(), make_method()
    index = torch.tensor([0, 7, 13, 25])
    batch = embeddings_of(4, seed=3)
    whole.loss(batch, index, CAMIDS[index])
    whole.update(index, batch)
    for rows in (slice(0, 2), slice(2, 4)):
        part = Embeddings(batch.global_features[rows])
        parts.loss(part, index[rows], CAMIDS[index[rows]])
    parts.update(index, batch)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name
