"""Features without what is common to all images of a camera."""

from __future__ import annotations

import torch
from torch import Tensor

from selcon_plugin.memory import cluster_means

# Images of a camera whose mean is half believed. The mean of few images is more about who
# is on them than about the camera, and that of a single one is the image itself.
PRIOR_IMAGES = 50
_ROWS_AT_ONCE = 65_536


def center_cameras(features: Tensor, camids: Tensor) -> Tensor:
    """Move the images of each camera so that the cameras' means agree.

    Light, tint and background make images of one camera alike whoever is on them, and the
    neighbours of an image are then mostly its camera's. To every image is added

        n / (n + 50) · (mean of all images - mean of its camera's n images)

    and the result is scaled to unit length. With one camera nothing changes. As in the
    camera-based batch normalisation of Zhuang et al., ECCV 2020
    (https://arxiv.org/abs/2001.08680), cameras are made alike in their first moment; their
    variances hardly differ in unit features.

    Args:
        features: Unit vectors ``(M, C)``, on any device.
        camids: Camera of each image, int64 ``(M,)``, -1 where unknown; these images are
            left as they are and count in no mean.

    Returns:
        Unit vectors ``(M, C)``.
    """
    camids = camids.to(features.device)
    known = camids >= 0
    if not known.any():
        return features
    cameras, camera_of = torch.unique(camids, return_inverse=True)
    if not known.all():  # the lowest number; -1 as in clusters, no row of its own
        cameras, camera_of = cameras[1:], camera_of - 1
    counts = torch.bincount(camera_of[known], minlength=len(cameras)).to(features)[:, None]
    means = cluster_means(
        features, camera_of, num_clusters=len(cameras), normalize=False
    )  # (cameras, C)
    everywhere = (means * counts).sum(dim=0) / counts.sum()
    shift = (everywhere - means) * counts / (counts + PRIOR_IMAGES)
    stays = torch.zeros_like(everywhere)[None]
    shift = torch.cat([shift, stays])  # row -1, of unknown cameras
    centered = torch.empty_like(features)
    for start in range(0, len(features), _ROWS_AT_ONCE):  # no further copy of all
        rows = slice(start, start + _ROWS_AT_ONCE)
        moved = features[rows] + shift[camera_of[rows]]
        centered[rows] = torch.nn.functional.normalize(moved, dim=1)
    return centered
