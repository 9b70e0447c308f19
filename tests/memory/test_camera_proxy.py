from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F

from helpers.features import units_of
from selcon_plugin.memory.camera_proxy import (
    CameraProxyMemory,
    camera_sum_weights,
    number_camera_proxies,
)
from selcon_plugin.memory.cluster import ClusterMemory
from selcon_plugin.memory.writes import cluster_means

M, C = 30, 8
# There are clusters 0..5, two outliers, cameras 3, 5 and 9, and some unknown cameras.
LABELS = torch.tensor([i % 6 if i < 28 else -1 for i in range(M)])
CAMIDS = torch.tensor([(3, 5, 9, 5, -1)[i * i % 5] for i in range(M)])
units = units_of(C)


def test_proxies_are_the_pairs_of_cluster_and_camera(device: str) -> None:
    found = number_camera_proxies(LABELS.to(device), CAMIDS)
    proxies, clusters, cameras = (part.tolist() for part in found)
    pairs = list(zip(LABELS.tolist(), CAMIDS.tolist(), strict=True))
    assert [proxy == -1 for proxy in proxies] == [label == -1 for label, _ in pairs]
    wanted = sorted({pair for pair in pairs if pair[0] != -1})
    number = {-1: -1, 3: 0, 5: 1, 9: 2}
    assert list(zip(clusters, cameras, strict=True)) == [
        (label, number[camid]) for label, camid in wanted
    ]
    for proxy, pair in zip(proxies, pairs, strict=True):
        assert proxy == -1 or wanted[proxy] == pair


def test_cameras_are_numbered_without_a_gap() -> None:
    """Camera 1 has an outlier only and, like the unknown camera, gets no number."""
    found = number_camera_proxies(torch.tensor([0, -1, 0]), torch.tensor([70, 1, 90]))
    assert found.cameras.tolist() == [0, 1]


def test_with_one_camera_proxies_equal_clusters() -> None:
    found = number_camera_proxies(LABELS, torch.full((M,), 4))
    assert torch.equal(found.proxies, LABELS)
    assert torch.equal(found.clusters, torch.arange(6))


def test_with_one_camera_per_image_every_image_is_a_proxy() -> None:
    found = number_camera_proxies(LABELS, torch.arange(M))
    inside = LABELS >= 0
    assert len(torch.unique(found.proxies[inside])) == inside.sum()
    assert torch.equal(found.clusters[found.proxies[inside]], LABELS[inside])


def test_outliers_only_have_no_proxy() -> None:
    found = number_camera_proxies(torch.full((3,), -1), torch.tensor([0, 1, -1]))
    assert found.proxies.tolist() == [-1, -1, -1]
    assert len(found.clusters) == len(found.cameras) == 0


def test_weights_turn_a_mean_into_the_sum_of_camera_means(device: str) -> None:
    cameras = torch.tensor([0, 2, -1, 0, 0, 2, 1], device=device)
    counted = torch.tensor([True, True, True, True, False, True, False], device=device)
    losses = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0], device=device)
    weights = camera_sum_weights(cameras, cameras, counted)
    mean = (weights * losses)[counted].mean()
    assert mean.item() == pytest.approx((1 + 8) / 2 + (2 + 32) / 2 + 4)


def test_weights_of_a_micro_batch_equal_those_of_the_batch() -> None:
    cameras = torch.tensor([0, 1, 1, 0, 0])
    every = torch.ones(5, dtype=torch.bool)
    whole = camera_sum_weights(cameras, cameras, every)
    assert torch.equal(camera_sum_weights(cameras[2:], cameras, every), whole[2:])


def test_memory_starts_from_the_means_and_is_written_in_batch_order(device: str) -> None:
    memory = CameraProxyMemory(M, C, momentum=0.3).to(device)
    features = units(M, seed=0)
    memory.reset(features.to(device), LABELS.to(device), CAMIDS.to(device))
    proxies = number_camera_proxies(LABELS, CAMIDS).proxies
    rows = []
    for proxy in range(len(memory.clusters)):
        rows.append(F.normalize(features[proxies == proxy].mean(dim=0), dim=0))
    assert torch.allclose(memory.bank.cpu(), torch.stack(rows), atol=1e-6)

    index = torch.tensor([0, 6, 29, 12, 0, 7])  # 29 is an outlier
    batch = units(len(index), seed=1)
    for image, feature in zip(index.tolist(), batch, strict=True):
        proxy = int(proxies[image])
        if proxy >= 0:
            rows[proxy] = F.normalize(0.3 * rows[proxy] + 0.7 * feature, dim=0)
    memory.update(index.to(device), batch.to(device))
    assert torch.allclose(memory.bank.cpu(), torch.stack(rows), atol=1e-6)


def test_one_camera_equals_the_cluster_memory() -> None:
    features, index, batch = units(M, seed=0), torch.arange(9), units(9, seed=1)
    memory = CameraProxyMemory(M, C, momentum=0.2)
    memory.reset(features, LABELS, torch.zeros(M, dtype=torch.int64))
    memory.update(index, batch)
    clusters = ClusterMemory(cluster_means(features, LABELS), momentum=0.2)
    clusters.update(batch, LABELS[index])
    assert torch.equal(memory.bank, clusters.bank)


def test_checkpoint_restores_its_own_proxies() -> None:
    memory = CameraProxyMemory(M, C)
    memory.reset(units(M, seed=0), LABELS, CAMIDS)
    stream = io.BytesIO()
    torch.save(memory.state_dict(), stream)
    stream.seek(0)
    fresh = CameraProxyMemory(M, C)
    fresh.reset(units(M, seed=1), torch.arange(M) % 2, CAMIDS)  # from another epoch
    fresh.load_state_dict(torch.load(stream, weights_only=True))
    for name, tensor in memory.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name


def test_cameras_of_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one camera for each of the 30 .*\(3,\)"):
        number_camera_proxies(LABELS, torch.zeros(3, dtype=torch.int64))
