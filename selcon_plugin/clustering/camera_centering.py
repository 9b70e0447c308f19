"""Features without what is common to all images of a camera."""

from __future__ import annotations

import torch
from torch import Tensor

# Images of a camera whose mean is half believed. The mean of few images is more about who
# is on them than about the camera, and that of a single one is the image itself.
PRIOR_IMAGES = 50


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
    cameras, camera_of = torch.unique(camids[known], return_inverse=True)
    counts = torch.bincount(camera_of, minlength=len(cameras)).to(features.dtype)[:, None]
    sums = features.new_zeros(len(cameras), features.shape[1])
    sums.index_add_(0, camera_of, features[known])
    shift = sums.sum(dim=0) / counts.sum() - sums / counts  # (cameras, C)
    shift *= counts / (counts + PRIOR_IMAGES)
    centered = features.clone()
    centered[known] += shift[camera_of]
    return torch.nn.functional.normalize(centered, dim=1)
