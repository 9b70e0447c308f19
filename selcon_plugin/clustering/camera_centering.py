"""Features without what is common to all images of a camera."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from selcon_plugin.memory.writes import cluster_means

# The mean of few images is more about who is on them than about the camera. A camera of
# fewer stays as it is: trained on 304 crops by six cameras, centering cost 5 and 9 mAP.
FEWEST_IMAGES = 100
# Images of a camera whose mean is half believed.
PRIOR_IMAGES = 50
_ROWS_AT_ONCE = 65_536


def num_centered(camids: Tensor) -> int:
    """Return how many cameras :func:`center_cameras` moves; 0 where nothing changes.

    Args:
        camids: Camera of each image, int64 ``(M,)``, -1 where unknown.
    """
    return int(_are_moved(*torch.unique(camids, return_counts=True)).sum())


def _are_moved(cameras: Tensor, counts: Tensor) -> Tensor:
    """Return which cameras are moved, of their numbers and their images' counts."""
    large = (cameras >= 0) & (counts >= FEWEST_IMAGES)
    return large & (large.sum() > 1)  # one alone has nothing to agree with


def center_cameras(features: Tensor, camids: Tensor) -> Tensor:
    """Move the images of each camera so that the cameras' means agree.

    Light, tint and background make images of one camera alike whoever is on them, and the
    neighbors of an image are then mostly its camera's. To every image is added

        n / (n + 50) · (mean of all images - mean of its camera's n images)

    and the result is scaled to unit length; with one camera nothing changes. Cameras of
    fewer than 100 images are left as they are, like unknown ones. As in the camera-based
    batch normalization of Zhuang et al., ECCV 2020 (https://arxiv.org/abs/2001.08680),
    cameras are made alike in their first moment; their variances hardly differ in unit
    features.

    Args:
        features: Unit vectors ``(M, C)``, on any device.
        camids: Camera of each image, int64 ``(M,)``, -1 where unknown; images of unknown
            or small cameras are left as they are and count in no mean.

    Returns:
        Unit vectors ``(M, C)``.
    """
    cameras, camera_of, counts = torch.unique(
        camids.to(features.device), return_inverse=True, return_counts=True
    )
    moved = _are_moved(cameras, counts)
    if not moved.any():
        return features
    # Numbered anew, -1 for the cameras that stay.
    number = torch.where(moved, moved.cumsum(dim=0) - 1, -1)
    camera_of, counts = number[camera_of], counts[moved].to(features)[:, None]
    means = cluster_means(
        features, camera_of, num_clusters=len(counts), normalize=False
    )  # (cameras, C)
    everywhere = (means * counts).sum(dim=0) / counts.sum()
    shift = (everywhere - means) * counts / (counts + PRIOR_IMAGES)
    shift = F.pad(shift, (0, 0, 0, 1))  # row -1 stays
    centered = torch.empty_like(features)
    for start in range(0, len(features), _ROWS_AT_ONCE):  # no further copy of all
        rows = slice(start, start + _ROWS_AT_ONCE)
        centered[rows] = F.normalize(features[rows] + shift[camera_of[rows]], dim=1)
    return centered
