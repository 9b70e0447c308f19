from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.features import units_of
from selcon_plugin.clustering import PseudoLabels
from selcon_plugin.features import Embeddings
from selcon_plugin.losses import selective_contrastive_loss
from selcon_plugin.methods import Method, build_method
from selcon_plugin.methods.cap import CAP

M, C, TAU = 30, 16, 0.2
LABELS = torch.tensor([i // 5 if i < 25 else -1 for i in range(M)])  # 5 clusters of 5
CAMIDS = torch.tensor([(2, 4, 4, 7, -1)[i * 3 % 5] for i in range(M)])
BATCH = torch.tensor([0, 1, 4, 7, 12, 26, 18, 19])
units = units_of(C)


def make_method(
    name: str = "CAP", camids: Tensor = CAMIDS, *, epoch: int = 0, **options: Any
) -> Method:
    method = build_method(name, M, C, **options)
    method.start_epoch(epoch)
    method.prepare(Embeddings(units(M, seed=0)), camids, PseudoLabels(LABELS))
    return method


def losses_of(method: Method, index: Tensor = BATCH, *, seed: int = 3) -> dict[str, float]:
    found = method.loss(Embeddings(units(len(index), seed=seed)), index, None)
    return {name: value.item() for name, value in found.items()}


def losses_in_loops(num_negatives: int) -> dict[str, float]:
    """Compute both losses by definition, from images, clusters and cameras only."""
    features = units(M, seed=0)
    proxies: dict[tuple[int, int], Tensor] = {}
    for pair in set(zip(LABELS.tolist(), CAMIDS.tolist(), strict=True)):
        members = [i for i in range(M) if (int(LABELS[i]), int(CAMIDS[i])) == pair]
        if pair[0] >= 0:
            proxies[pair] = F.normalize(features[members].mean(dim=0), dim=0).double()
    intra: dict[int, list[float]] = {}
    inter: dict[int, list[float]] = {}
    for image, feature in zip(BATCH.tolist(), units(len(BATCH), seed=3), strict=True):
        label, camera = int(LABELS[image]), int(CAMIDS[image])
        if label < 0:
            continue
        logit = {pair: float(feature.double() @ row) / TAU for pair, row in proxies.items()}
        if camera >= 0:
            total = sum(math.exp(z) for (_, cam), z in logit.items() if cam == camera)
            intra.setdefault(camera, []).append(math.log(total) - logit[label, camera])
        own = [z for (cluster, _), z in logit.items() if cluster == label]
        others = sorted(z for (cluster, _), z in logit.items() if cluster != label)
        total = sum(math.exp(z) for z in own + others[-num_negatives:])
        loss = math.log(total) - sum(own) / len(own)
        inter.setdefault(camera, []).append(loss)

    def camera_sum(losses: dict[int, list[float]]) -> float:
        return sum(sum(values) / len(values) for values in losses.values())

    return {"loss_intra": camera_sum(intra), "loss_inter": 0.5 * camera_sum(inter)}


@pytest.mark.parametrize("num_negatives", [2, 50])
def test_losses_equal_their_definition(num_negatives: int) -> None:
    method = make_method(
        epoch=5, temperature=TAU, num_negatives=num_negatives, inter_weight=0.5
    )
    assert losses_of(method) == pytest.approx(losses_in_loops(num_negatives), rel=1e-5)


def test_inter_camera_loss_starts_at_its_epoch() -> None:
    assert set(losses_of(make_method(epoch=4))) == {"loss_intra"}
    assert set(losses_of(make_method(epoch=5))) == {"loss_intra", "loss_inter"}
    assert set(losses_of(make_method(inter_epoch=0))) == {"loss_intra", "loss_inter"}


def test_one_camera_equals_cluster_contrast() -> None:
    """Compare loss and memory over several steps; after ``inter_epoch`` it is 1.5 times."""
    camids = torch.full((M,), 3)
    options: dict[str, Any] = {"temperature": 0.1, "bank_momentum": 0.2}
    cap = make_method(camids=camids, **options)
    plain = make_method("ClusterContrast", camids, **options)
    assert isinstance(cap, CAP)
    for seed in range(3):
        wanted = losses_of(plain, seed=seed)["loss_cluster"]
        assert losses_of(cap, seed=seed) == pytest.approx({"loss_intra": wanted}, rel=1e-6)
        embeddings = Embeddings(units(len(BATCH), seed=seed))
        for method in (cap, plain):
            method.update(BATCH, embeddings)
        assert torch.equal(cap.proxies.bank, plain.memory.bank)
    cap.start_epoch(5)
    total = sum(losses_of(cap).values())
    assert total == pytest.approx(1.5 * losses_of(plain)["loss_cluster"], rel=1e-6)


def test_one_camera_per_image_equals_the_selective_loss_on_images() -> None:
    """The intra-camera loss is zero, and the positives are the images of the cluster."""
    method = make_method(camids=torch.arange(M), inter_epoch=0, inter_weight=1.0)
    clustered = torch.tensor([0, 7, 12])
    found = losses_of(method, clustered)
    same = LABELS[clustered][:, None] == LABELS[:25]
    loss = selective_contrastive_loss(
        units(3, seed=3),
        units(M, seed=0),
        same.nonzero()[:, 1].view(3, 5),
        (~same).nonzero()[:, 1].view(3, 20),
        positive_weight=torch.full((5,), 0.2),
        temperature=0.07,
    )
    assert found["loss_intra"] == 0
    assert found["loss_inter"] == pytest.approx(3 * loss.item(), rel=1e-5)  # 3 cameras


def test_cameras_have_equal_weight_regardless_of_their_images() -> None:
    """Compare batches with the first image once and three times."""
    once, thrice = torch.tensor([0, 1]), torch.tensor([0, 0, 0, 1])
    method = make_method(inter_epoch=0)
    features = units(2, seed=3)
    assert CAMIDS[0] != CAMIDS[1]
    few = method.loss(Embeddings(features), once, None)
    many = method.loss(Embeddings(features[thrice]), thrice, None)
    for name, loss in few.items():
        assert torch.allclose(loss, many[name]), name


def test_unknown_camera_has_only_the_inter_camera_loss() -> None:
    method = make_method(inter_epoch=0)
    unknown = torch.nonzero((CAMIDS < 0) & (LABELS >= 0)).flatten()[:2]
    found = losses_of(method, unknown)
    assert found["loss_intra"] == 0
    assert found["loss_inter"] > 0


@pytest.mark.parametrize("name", ["CAP", "O2CAP", "ViTC"])
@pytest.mark.parametrize("camids", [None, torch.full((M,), -1)])
def test_missing_cameras_give_an_error_with_a_remedy(
    name: str, camids: Tensor | None
) -> None:
    method = build_method(name, M, C)
    with pytest.raises(ValueError, match=rf"^{name} learns from the camera.*--camera-pat"):
        method.prepare(Embeddings(units(M, seed=0)), camids, PseudoLabels(LABELS))


@pytest.mark.parametrize("name", ["CAP", "O2CAP", "ViTC"])
def test_fresh_method_resumes_from_a_checkpoint(name: str) -> None:
    method, fresh = make_method(name, epoch=7), build_method(name, M, C)
    fresh.load_state_dict(method.state_dict())
    assert fresh.prepared
    assert losses_of(fresh) == losses_of(method)
