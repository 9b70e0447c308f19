from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from selcon_plugin.losses.camera_weights import (
    CAMERA_WEIGHTS,
    CameraWeighting,
    camera_entropy_weights,
    cluster_camera_entropy,
)


def random_images(seed: int, size: int = 60) -> tuple[Tensor, Tensor]:
    """Return clusters -1..7 and cameras -1..3; cluster 6 has only camera 2, 7 only -1."""
    generator = torch.Generator().manual_seed(seed)
    clusters = torch.randint(-1, 8, (size,), generator=generator)
    camids = torch.randint(-1, 4, (size,), generator=generator)
    camids[clusters == 6] = 2
    camids[clusters == 7] = -1
    return clusters, camids


def entropy_by_loops(clusters: Tensor, camids: Tensor, cluster: int, base: float) -> float:
    pairs = zip(clusters.tolist(), camids.tolist(), strict=True)
    histogram = Counter(camera for own, camera in pairs if own == cluster and camera >= 0)
    total = sum(histogram.values())
    return -sum(n / total * math.log(n / total, base) for n in histogram.values())


def batch_weights_by_loops(targets: Tensor, camids: Tensor) -> list[float]:
    present = sorted(set(targets.tolist()) - {-1})
    raw = {k: math.exp(entropy_by_loops(targets, camids, k, 2.0)) for k in present}
    mean = sum(raw.values()) / len(raw)
    return [raw[k] / mean if k >= 0 else 0.0 for k in targets.tolist()]


@pytest.mark.parametrize("seed", range(4))
def test_cluster_entropy_equals_definition_by_loops(seed: int, device: str) -> None:
    labels, camids = random_images(seed)
    found = cluster_camera_entropy(labels.to(device), camids.to(device))
    assert found.device.type == device
    expected = [entropy_by_loops(labels, camids, k, math.e) for k in range(8)]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert found[6] == 0.0
    assert found[7] == 0.0


def test_cluster_entropy_computed_by_hand() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, -1])
    camids = torch.tensor([5, 5, 9, 9, 3, 3, 3, -1, 1])
    found = cluster_camera_entropy(labels, camids)
    assert found.tolist() == [pytest.approx(math.log(2)), 0.0, 0.0]
    labels, camids = torch.zeros(4, dtype=torch.int64), torch.tensor([0, 0, 0, 1])
    expected = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert cluster_camera_entropy(labels, camids).tolist() == pytest.approx([expected])


@pytest.mark.parametrize("camera", [-1, 0])
def test_cluster_entropy_without_clusters_or_with_one_camera(camera: int) -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    assert cluster_camera_entropy(nothing, nothing).shape == (0,)
    camids = torch.full((4,), camera)
    assert cluster_camera_entropy(torch.full((4,), -1), camids).shape == (0,)
    assert cluster_camera_entropy(torch.tensor([0, 1, 1, -1]), camids).tolist() == [0, 0]


@pytest.mark.parametrize("seed", range(4))
def test_batch_weights_equal_definition_by_loops(seed: int, device: str) -> None:
    targets, camids = random_images(seed)
    found = camera_entropy_weights(targets.to(device), camids.to(device), mode="batch")
    assert found.device.type == device
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(
        batch_weights_by_loops(targets, camids), rel=1e-5
    )


def test_batch_weights_computed_by_hand() -> None:
    # Cluster 4 has two equally frequent cameras (1 bit), cluster 2 one camera (0 bits).
    # Their mean is (e + 1) / 2, although cluster 4 has twice as many images.
    targets = torch.tensor([4, 2, 4, 4, 2, 4])
    camids = torch.tensor([0, 7, 1, 0, 7, 1])
    found = camera_entropy_weights(targets, camids, mode="batch")
    several, one = 2 * math.e / (math.e + 1), 2 / (math.e + 1)
    assert found.tolist() == pytest.approx([several, one, several, several, one, several])


def test_batch_weights_are_1_if_all_clusters_have_equal_entropy() -> None:
    targets = torch.tensor([0, 0, 1, 1])
    for camids in ([0, 1, 2, 3], [0, 0, 0, 0], [0, 0, 1, 1], [-1, -1, -1, -1]):
        found = camera_entropy_weights(targets, torch.tensor(camids), mode="batch")
        assert found.tolist() == pytest.approx([1.0] * 4)


def test_unknown_cameras_are_ignored_and_get_the_weight_of_their_cluster() -> None:
    targets = torch.tensor([0, 0, 1, 1])
    known = camera_entropy_weights(targets, torch.tensor([0, 1, 2, 2]), mode="batch")
    targets = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    camids = torch.tensor([-1, 0, -1, 1, 2, -1, 2])
    found = camera_entropy_weights(targets, camids, mode="batch")
    assert found.tolist() == pytest.approx([known[0].item()] * 4 + [known[2].item()] * 3)


def test_autocast_changes_nothing() -> None:
    targets, camids = random_images(0)
    expected = camera_entropy_weights(targets, camids, mode="batch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = camera_entropy_weights(targets, camids, mode="batch")
    assert torch.equal(found, expected)


def test_weights_over_the_data_set(device: str) -> None:
    entropy = torch.tensor([0.0, math.log(2), 1.5], device=device)
    targets = torch.tensor([2, 0, -1, 1, 0], device=device)
    camids = torch.zeros_like(targets)  # ignored
    weights = {
        mode: camera_entropy_weights(targets, camids, mode=mode, cluster_entropy=entropy)
        for mode in ("cluster", "multi_camera")
    }
    expected = [math.log(2.5), 0.0, 0.0, math.log(1 + math.log(2)), 0.0]
    assert weights["cluster"].tolist() == pytest.approx(expected)
    assert weights["multi_camera"].tolist() == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert weights["multi_camera"].dtype == torch.float32


@pytest.mark.parametrize("mode", ["cluster", "multi_camera"])
def test_one_camera_data_are_weighted_equally_but_one_camera_batches_are_not(
    mode: str,
) -> None:
    targets, camids = torch.tensor([0, 1, -1]), torch.tensor([0, 0, 0])

    def weights(entropy: list[float]) -> list[float]:
        tensor = torch.tensor(entropy)
        return camera_entropy_weights(
            targets,
            camids,
            mode=mode,  # type: ignore[arg-type]
            cluster_entropy=tensor,
        ).tolist()

    assert weights([0.0, 0.0]) == [1.0, 1.0, 0.0]
    assert weights([0.0, 0.0, 0.7]) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("mode", ["batch", "cluster", "multi_camera"])
def test_batch_of_outliers_has_weights_0(mode: str) -> None:
    found = camera_entropy_weights(
        torch.tensor([-1, -1]),
        torch.tensor([0, 1]),
        mode=mode,  # type: ignore[arg-type]
        cluster_entropy=torch.empty(0),
    )
    assert found.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("mode", ["batch", "cluster", "multi_camera"])
def test_weighting_of_a_method_equals_the_function(mode: str, device: str) -> None:
    labels, camids = (tensor.to(device) for tensor in random_images(0))
    weighting = CameraWeighting(len(labels), mode).to(device)
    weighting.prepare(labels, camids)
    index = torch.arange(5, 25, device=device)
    targets = labels[index]
    expected = camera_entropy_weights(
        targets,
        camids[index],
        mode=mode,  # type: ignore[arg-type]
        cluster_entropy=cluster_camera_entropy(labels, camids),
    )
    expected[targets < 0] = 1.0  # a method that keeps outliers does not weight them
    found = weighting(index, targets, camids[index])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    # New clusters replace the old ones, and the size of the state does not change.
    before = {name: tensor.shape for name, tensor in weighting.state_dict().items()}
    weighting.prepare(torch.zeros_like(labels), torch.zeros_like(camids))
    assert {k: v.shape for k, v in weighting.state_dict().items()} == before
    assert weighting(index, torch.zeros_like(index), camids[index] * 0).tolist() == [1] * 20


def test_weighting_of_a_method_without_mode_or_cameras_is_none() -> None:
    labels, camids = random_images(0)
    for mode in CAMERA_WEIGHTS:
        weighting = CameraWeighting(len(labels), mode)
        weighting.prepare(labels, None)
        assert weighting(labels, labels, None) is None
    weighting = CameraWeighting(len(labels), "none")
    weighting.prepare(labels, camids)
    assert weighting(labels, labels, camids) is None


def test_wrong_arguments_are_reported() -> None:
    two, three = torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="batch, cluster, multi_camera, got 'epoch'"):
        camera_entropy_weights(two, two, mode="epoch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"camids .*each of the 2 targets.*\(3,\)"):
        camera_entropy_weights(two, three, mode="batch")
    with pytest.raises(ValueError, match=r"camids .*each of the 3 labels.*\(2,\)"):
        cluster_camera_entropy(three, two)
    for mode in ("cluster", "multi_camera"):
        with pytest.raises(ValueError, match=f"'{mode}' needs cluster_entropy"):
            camera_entropy_weights(two, two, mode=mode)  # type: ignore[arg-type]
