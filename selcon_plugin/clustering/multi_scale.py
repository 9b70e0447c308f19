"""Jaccard distance over several neighborhood sizes, for any number of images per person.

The k-reciprocal Jaccard distance has one neighborhood size, k1, and works if it is about
1.5 to 2 times the images per person: 30 for the 17 of Market-1501, 6 for four. Where that
number is not known, or differs from person to person, the mean of the distances at 4, 9 and
20 neighbors takes its place: two images are close if they share neighbors at any of these
sizes, and closest if they do at all of them.

Features of a network that was trained on other images vary most along a few directions that
say little about the persons, such as illumination. Before the search for neighbors, the
deviations from the mean are therefore projected onto their principal components, and each
component is divided by the square root of its standard deviation: a whitening by half
(Jegou and Chum, "Negative evidences and co-occurrences in image retrieval", ECCV 2012,
whiten fully).

Shape shorthand in this module:

    M: images
    C: feature dimension
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selcon_plugin.clustering.copies import distances_with_copies
from selcon_plugin.clustering.jaccard import ZERO
from selcon_plugin.clustering.knn import nearest_neighbors

SCALES = (4, 9, 20)
_MOST_COMPONENTS = 128
# Keeps components of hardly any variance from being enlarged: a fraction of the mean
# standard deviation that is added to each one.
_FLOOR = 0.1
_SPREAD_OF_EQUAL_IMAGES = 1e-4
_ROWS_AT_ONCE = 65_536


def without_mean(features: Tensor) -> Tensor:
    """Subtract the mean of all images, which says nothing of a person, and normalize.

    Args:
        features: Unit vectors ``(M, C)``, on any device.

    Returns:
        Unit vectors ``(M, C)``; the features themselves if all images are equal.
    """
    mean = features.mean(dim=0)
    if _spread(features, mean) < _SPREAD_OF_EQUAL_IMAGES:
        return features
    return F.normalize(features - mean, dim=1)


def half_whitened(features: Tensor) -> Tensor:
    """Divide each principal component by the square root of its standard deviation.

    Args:
        features: Unit vectors ``(M, C)``, on any device.

    Returns:
        Unit vectors of up to 128 components; the features themselves if all images are
        equal.
    """
    mean = features.mean(dim=0)
    if _spread(features, mean) < _SPREAD_OF_EQUAL_IMAGES:
        return features
    num_images, dim = features.shape
    covariance = torch.zeros(dim, dim, dtype=torch.float64, device=features.device)
    for block in torch.split(features, _ROWS_AT_ONCE):
        deviation = (block - mean).double()
        covariance += deviation.T @ deviation
    variance, direction = torch.linalg.eigh(covariance / num_images)
    kept = min(_MOST_COMPONENTS, dim, num_images - 1)
    deviation = variance[-kept:].clamp_min(0).sqrt()
    scale = (deviation + _FLOOR * deviation.mean()).rsqrt()
    projection = (direction[:, -kept:] * scale).to(features)
    blocks = torch.split(features, _ROWS_AT_ONCE)
    return torch.cat([F.normalize((block - mean) @ projection, dim=1) for block in blocks])


def _spread(features: Tensor, mean: Tensor) -> float:
    if len(features) < 2:
        return 0.0
    return float((1 - mean.square().sum()).clamp_min(0).sqrt())


def multi_scale_distance(features: Tensor) -> Any:
    """Compute the mean Jaccard distance over three neighborhood sizes, at most M/2.

    Args:
        features: Unit vectors ``(M, C)``, on any device.

    Returns:
        ``scipy.sparse.csr_array`` of shape ``(M, M)`` as from
        :func:`~selcon_plugin.clustering.jaccard.jaccard_distance`: float32, symmetric, with
        a stored diagonal; entries that are not stored are 1.
    """
    whitened = half_whitened(features)
    if not len(features):
        return distances_with_copies(features, k1=1, k2=1)
    # In a small folder more neighbors would be nearly all of its images.
    most = max(2, len(features) // 2)
    neighbors = nearest_neighbors(whitened, min(most, SCALES[-1]))
    closeness: Any = None
    for k1 in (min(most, scale) for scale in SCALES):
        part = distances_with_copies(
            whitened, k1=k1, k2=max(1, round(k1 / 5)), neighbors=neighbors
        )
        part.data = (1 - part.data) / np.float32(len(SCALES))
        closeness = part if closeness is None else closeness + part
    closeness.data = np.maximum(1 - closeness.data, np.float32(ZERO)).astype(np.float32)
    closeness.sort_indices()
    return closeness
