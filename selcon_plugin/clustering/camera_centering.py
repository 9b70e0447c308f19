"""Per-camera feature centering: it removes the offset shared by a camera's images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from selcon_plugin.memory.writes import cluster_means

# The mean of few images depends more on the persons in them than on the camera. A camera
# with fewer images is not centered: when training on 304 crops from six cameras, centering
# cost 5 and 9 mAP.
MIN_IMAGES_PER_CAMERA = 100
# Strength of the shrinkage prior, in images: the offset of a camera with this many images
# is halved.
PRIOR_IMAGES = 50
_ROWS_AT_ONCE = 65_536


def num_centered(camids: Tensor) -> int:
    """Return how many cameras :func:`center_cameras` centers; 0 if nothing changes.

    Args:
        camids: Camera of each image, int64 ``(M,)``, -1 where unknown.
    """
    return int(_is_centered(*torch.unique(camids, return_counts=True)).sum())


def _is_centered(cameras: Tensor, counts: Tensor) -> Tensor:
    """Return which cameras are centered, given their ids and their image counts."""
    large = (cameras >= 0) & (counts >= MIN_IMAGES_PER_CAMERA)
    return large & (large.sum() > 1)  # a single camera has no other mean to match


def center_cameras(features: Tensor, camids: Tensor) -> Tensor:
    """Shift the features of each camera so that all cameras have the same mean.

    Illumination, tint and background make images of one camera similar regardless of the
    person, so most neighbors of an image come from its own camera. The offset

        n / (n + 50) · (mean of all images - mean of its camera's n images)

    is added to every feature, and the result is L2-normalized; with one camera nothing
    changes. Cameras with fewer than 100 images are left unchanged, as are images of unknown
    camera. As in the camera-based batch normalization of Zhuang et al., ECCV 2020
    (https://arxiv.org/abs/2001.08680), the first moments of the cameras are aligned; their
    variances hardly differ in unit features.

    Args:
        features: Unit vectors ``(M, C)``, on any device.
        camids: Camera of each image, int64 ``(M,)``, -1 where unknown; images of unknown
            or small cameras are left unchanged and enter no mean.

    Returns:
        Unit vectors ``(M, C)``.
    """
    cameras, camera_of, counts = torch.unique(
        camids.to(features.device), return_inverse=True, return_counts=True
    )
    if not _is_centered(cameras, counts).any():
        return features
    means = cluster_means(
        features, camera_of, num_clusters=len(counts), normalize=False
    )  # (cameras, C)
    shift = camera_shifts(cameras, counts, means)
    result = torch.empty_like(features)
    for start in range(0, len(features), _ROWS_AT_ONCE):  # avoids another full copy
        rows = slice(start, start + _ROWS_AT_ONCE)
        result[rows] = F.normalize(features[rows] + shift[camera_of[rows]], dim=1)
    return result


def camera_shifts(cameras: Tensor, counts: Tensor, means: Tensor) -> Tensor:
    """Return the offset that :func:`center_cameras` adds to the features of each camera.

    Args:
        cameras: Id of each of K cameras, int64 ``(K,)``, -1 for the images of unknown
            camera.
        counts: Number of images of each camera, int64 ``(K,)``.
        means: Mean of the features of each camera's images, shape ``(K, C)``.

    Returns:
        Offsets ``(K, C)``, 0 for cameras that are not centered.
    """
    # Cameras that are not centered count as ones without images.
    counts = torch.where(_is_centered(cameras, counts), counts, 0).to(means)[:, None]
    global_mean = (means * counts).sum(dim=0) / counts.sum().clamp(min=1)
    return (global_mean - means) * counts / (counts + PRIOR_IMAGES)
