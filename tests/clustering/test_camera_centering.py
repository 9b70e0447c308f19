"""Per-camera feature centering: definition by loops, invariants, real clusters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from selcon_plugin.clustering import build_labeler, camera_centering
from selcon_plugin.clustering.camera_centering import (
    MIN_IMAGES_PER_CAMERA,
    PRIOR_IMAGES,
    center_cameras,
    num_centered,
)
from selcon_plugin.clustering.quality import adjusted_mutual_info

# Two cameras are large enough, one is an image short; some cameras are unknown.
SIZES = {3: 160, 0: 100, 7: 99, -1: 41}
CAMERAS = torch.cat([torch.full((count,), camera) for camera, count in SIZES.items()])
CAMERAS = CAMERAS[torch.randperm(400, generator=torch.Generator().manual_seed(4))]
MOVED = (CAMERAS == 3) | (CAMERAS == 0)


def unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features, dim=1)


def some_features(num_images: int = 400) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return unit(torch.randn(num_images, 6, generator=generator))


def by_loops(features: Tensor, camids: Tensor) -> Tensor:
    rows, cameras = features.tolist(), camids.tolist()
    large = [c for c in cameras if c >= 0 and cameras.count(c) >= MIN_IMAGES_PER_CAMERA]
    known = [i for i, camera in enumerate(cameras) if camera in large]
    result = []
    for row, camera in zip(rows, cameras, strict=True):
        own = [i for i in known if cameras[i] == camera]
        moved = list(row)
        for axis in range(len(row)) if own else ():
            everywhere = sum(rows[i][axis] for i in known) / len(known)
            here = sum(rows[i][axis] for i in own) / len(own)
            moved[axis] += len(own) / (len(own) + PRIOR_IMAGES) * (everywhere - here)
        length = sum(value**2 for value in moved) ** 0.5
        result.append([value / length for value in moved])
    return torch.tensor(result)


def test_equals_the_definition_in_loops(device: str) -> None:
    features = some_features().to(device)
    before = features.clone()
    found = center_cameras(features, CAMERAS)
    assert found.device == features.device
    torch.testing.assert_close(found.cpu(), by_loops(features.cpu(), CAMERAS))
    assert torch.equal(features, before)
    assert not torch.allclose(
        found[MOVED.to(device)], features[MOVED.to(device)], atol=0.01
    )


def test_images_of_unknown_and_of_small_cameras_stay() -> None:
    features = some_features()
    found = center_cameras(features, CAMERAS)
    torch.testing.assert_close(found[~MOVED], features[~MOVED])
    # They do not move the other images either.
    without = center_cameras(features[MOVED], CAMERAS[MOVED])
    torch.testing.assert_close(found[MOVED], without)


@pytest.mark.parametrize("camera", [2, -1])
@pytest.mark.parametrize("num_images", [0, 1, 400])
def test_one_camera_or_none_changes_nothing(num_images: int, camera: int) -> None:
    features = some_features(num_images)
    found = center_cameras(features, torch.full((num_images,), camera))
    assert torch.equal(found, features)
    assert num_centered(torch.full((num_images,), camera)) == 0


def test_rows_are_processed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = center_cameras(some_features(), CAMERAS)
    monkeypatch.setattr(camera_centering, "_ROWS_AT_ONCE", 7)
    assert torch.equal(center_cameras(some_features(), CAMERAS), whole)


def people_seen_by_cameras(shift: float) -> tuple[Tensor, Tensor, Tensor]:
    """Twelve persons with ten images each from three cameras with different shifts."""
    generator = torch.Generator().manual_seed(0)
    people = torch.arange(12).repeat_interleave(30)
    camids = torch.arange(3).repeat_interleave(10).repeat(12)
    looks = torch.randn(12, 32, generator=generator)[people]
    tints = shift * torch.randn(3, 32, generator=generator)[camids]
    noise = 0.3 * torch.randn(len(people), 32, generator=generator)
    return unit(looks + tints + noise), camids, people


def ami(features: Tensor, camids: Tensor, people: Tensor, *, center: bool) -> float:
    labeler = build_labeler("DBSCAN", center_cameras=center)
    return adjusted_mutual_info(labeler(features, camids).labels, people)


def test_persons_are_found_across_cameras_that_look_different() -> None:
    data = people_seen_by_cameras(shift=1.0)
    assert ami(*data, center=False) < 0.7  # split by camera
    assert ami(*data, center=True) > 0.99
    alike = people_seen_by_cameras(shift=0.0)
    assert ami(*alike, center=False) > 0.99
    assert ami(*alike, center=True) > 0.99


def test_without_cameras_there_is_nothing_to_center() -> None:
    features, camids, _ = people_seen_by_cameras(shift=1.0)
    centered = build_labeler("DBSCAN", center_cameras=True)
    plain = build_labeler("DBSCAN")
    assert torch.equal(centered(features).labels, plain(features).labels)
    unknown = torch.full_like(camids, -1)
    assert torch.equal(centered(features, unknown).labels, plain(features).labels)
