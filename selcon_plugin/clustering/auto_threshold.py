"""Unsupervised threshold of average linkage, and the number of images per person.

With m images per person the agreement of clusters and persons is largest close to the
threshold t = 1 - 1/m, for each network that was tried, and it is flat: half or twice m
costs little. Where m is unknown, the threshold with the largest score is taken,

    S(t) + S'(t) - 1.5 (t - t0)^2,

with S the mean silhouette of the clusters by the cosine distance. It prefers the images of
one camera to those of one person, so where cameras are known, S' compares each image with
those of other cameras only; otherwise S' is 0. With a weak network both mean little, and
the last term decides: t0 = 1 - 1/m0 belongs to the number of images per person that is
usual in a folder of M images, m0 = 8 (M / 1000)^0.4. The numbers were chosen on folders of
2 to 40 images per person with two networks, and on all training images of Market-1501
(``tools/benchmark/folders.py``, docs/benchmarks/folders.md).

Shape shorthand in this module:

    M: images
    C: feature dimension
    K: clusters
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selcon_plugin.clustering.linkage import Hierarchy, average_linkage
from selcon_plugin.clustering.multi_scale import multi_scale_distance, without_mean
from selcon_plugin.values import listed

THRESHOLDS = tuple(round(0.40 + 0.02 * step, 2) for step in range(29))  # 0.40 ... 0.96
# Images per person that are expected among 1,000 images, and how they grow with them.
_EXPECTED, _GROWTH = 8.0, 0.4
_FEWEST_EXPECTED = 2.5
_WEIGHT = 1.5
# A clustering in which a random image shares its cluster with most of the others is none.
_LARGEST_RATIO = 0.9
# The mean silhouette of 1,024 images has a standard error of 0.01, and the same images are
# compared at each threshold.
_FEWEST_SAMPLED, _MOST_SAMPLED = 1_024, 4_096
_PRODUCTS = 2**24


@dataclass(frozen=True)
class Cut:
    """Clusters of a hierarchy at one threshold.

    Attributes:
        threshold: Largest average distance at which clusters were merged.
        silhouette: Mean silhouette by the cosine distance; a cluster of one image counts
            as 0.
        size: Size of the cluster of a random image, on average.
        score: The score by which cuts are compared; -1 if nearly all images are one
            cluster.
    """

    threshold: float
    silhouette: float
    size: float
    score: float


def threshold_for(images_per_person: float) -> float:
    """Return the threshold for a known number of images per person.

    Args:
        images_per_person: Number of images of a person, on average, at least 1.

    Returns:
        1 - 1/m, within 0.40..0.96.

    Example:
        >>> threshold_for(4)
        0.75
    """
    return min(THRESHOLDS[-1], max(THRESHOLDS[0], 1 - 1 / images_per_person))


def images_for(threshold: float) -> float:
    """Return the number of images per person for which a threshold is right.

    Args:
        threshold: Threshold t of average linkage, below 1.

    Returns:
        1 / (1 - t), the inverse of :func:`threshold_for`.

    Example:
        >>> images_for(0.75)
        4.0
    """
    return 1 / (1 - threshold)


def chosen_threshold(
    hierarchy: Hierarchy,
    features: Tensor,
    camids: Tensor | None = None,
    *,
    images_per_person: float | str = "auto",
) -> float:
    """Return the threshold for a number of images per person, or the best one without it.

    Args:
        hierarchy: See :func:`choose_cut`.
        features: See :func:`choose_cut`.
        camids: See :func:`choose_cut`.
        images_per_person: The number, if it is known, or "auto".
    """
    if isinstance(images_per_person, str):
        return choose_cut(hierarchy, features, camids).threshold
    return threshold_for(images_per_person)


def estimate_images_per_person(features: Tensor) -> float:
    """Estimate how many images show the same person, without labels.

    It is a rough estimate, right within a factor of two on most folders, which is as much
    as the neighborhood sizes need.

    Args:
        features: Unit vectors ``(M, C)``, on any device.

    Returns:
        1 / (1 - t), with the threshold t of :func:`choose_cut` on the multi-scale Jaccard
        distance: 1.7 to 25.
    """
    hierarchy = average_linkage(multi_scale_distance(features))
    return images_for(chosen_threshold(hierarchy, features))


def check_hint(hint: float | str, options: Mapping[str, Any]) -> None:
    """Refuse a number of images per person that has no effect.

    Args:
        hint: The option ``images_per_person``, or "auto".
        options: Options that the number determines where they are "auto", by name.

    Raises:
        ValueError: If a number is given, and none of the options is "auto".
    """
    if hint != "auto" and "auto" not in options.values():
        names = listed(options)
        raise ValueError(
            f"images_per_person {hint:g} has no effect: set {names} to auto, or those of "
            "them that it is to determine"
        )


def choose_cut(hierarchy: Hierarchy, features: Tensor, camids: Tensor | None = None) -> Cut:
    """Choose the threshold without labels.

    Args:
        hierarchy: Merges of average linkage on the multi-scale Jaccard distance.
        features: Unit vectors ``(M, C)`` of the same images, on any device.
        camids: Camera of each image, -1 where unknown, ``(M,)``, or None.

    Returns:
        The cut with the largest score; the smallest threshold among equal ones.
    """
    return max(try_cuts(hierarchy, features, camids), key=lambda cut: cut.score)


def try_cuts(
    hierarchy: Hierarchy, features: Tensor, camids: Tensor | None = None
) -> list[Cut]:
    """Measure the clusters at every threshold of the grid.

    Args:
        hierarchy: See :func:`choose_cut`.
        features: See :func:`choose_cut`.
        camids: See :func:`choose_cut`.

    Returns:
        One cut per threshold, ascending.
    """
    compared = without_mean(features)
    across = camids is not None and len(np.unique(camids[camids >= 0].cpu())) > 1
    usual = threshold_for(_expected_images(hierarchy.num_images))
    cuts = []
    for threshold in THRESHOLDS:
        labels = hierarchy.cut(threshold)
        counts = np.bincount(labels).astype(np.float64)
        size = float((counts**2).sum() / max(1, counts.sum()))
        silhouette = mean_silhouette(compared, labels)
        score = silhouette - _WEIGHT * (threshold - usual) ** 2
        if across:
            score += mean_silhouette(compared, labels, camids)
        if len(counts) < 2 or size > _LARGEST_RATIO * len(labels):
            score = -1.0
        cuts.append(Cut(threshold, silhouette, size, score))
    return cuts


def _expected_images(num_images: int) -> float:
    expected: float = _EXPECTED * (num_images / 1000) ** _GROWTH
    return max(_FEWEST_EXPECTED, expected)


@torch.no_grad()
def mean_silhouette(
    features: Tensor, labels: NDArray[np.int64], camids: Tensor | None = None
) -> float:
    """Compute the mean silhouette by the cosine distance, from a sample of many images.

    With a the mean distance of an image to the others of its cluster and b the smallest
    mean distance to the images of another cluster, its silhouette is (b - a) / max(a, b);
    it is 0 in a cluster of one image. Mean distances are products with the clusters' sums,
    so the cost grows with M K.

    Args:
        features: Unit vectors ``(M, C)``, on any device.
        labels: Cluster 0, 1, ... of each image without gaps, ``(M,)``.
        camids: Camera of each image, ``(M,)``, to compare each image only with those of
            other cameras; it is 0 where its cluster has none. None to compare all.

    Returns:
        The mean over all images, or over 4,096 (among more than 4,096 clusters down to
        1,024) that are spread evenly; 0 with fewer than two clusters.
    """
    cluster_of = torch.from_numpy(labels).to(features.device)
    num_clusters = int(labels.max(initial=-1)) + 1
    if num_clusters < 2:
        return 0.0
    cameras = np.zeros_like(labels) if camids is None else camids.cpu().numpy()
    cameras, numbers = np.unique(cameras, return_inverse=True)
    groups = torch.from_numpy(numbers).to(cluster_of)
    sums, sizes = _sums(features, cluster_of, num_clusters)
    sampled = min(_MOST_SAMPLED, max(_FEWEST_SAMPLED, _PRODUCTS // num_clusters))
    step = max(1, -(-len(labels) // sampled))
    rows = torch.arange(0, len(labels), step, device=features.device)
    total = 0.0
    for group in range(len(cameras)):
        others = sums, sizes
        if camids is not None:  # the sums of one camera at a time: there may be many
            own = groups == group
            seen_here = _sums(features[own], cluster_of[own], num_clusters)
            others = sums - seen_here[0], sizes - seen_here[1]
        seen = rows[groups[rows] == group]
        for part in torch.split(seen, max(1, _PRODUCTS // num_clusters)):
            total += _sum_of(
                features[part], cluster_of[part], *others, includes_itself=camids is None
            )
    return total / len(rows)


def _sums(features: Tensor, cluster_of: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Return the sum of the features of each cluster ``(K, C)``, and its size ``(K,)``."""
    sums = features.new_zeros((num_clusters, features.shape[1]))
    sums.index_add_(0, cluster_of, features)
    return sums, torch.bincount(cluster_of, minlength=num_clusters)


def _sum_of(
    images: Tensor, own: Tensor, sums: Tensor, sizes: Tensor, *, includes_itself: bool
) -> float:
    """Return the sum of the silhouettes of images, compared with clusters."""
    distance = 1 - images @ (sums / sizes.clamp_min(1)[:, None]).T
    distance[:, sizes == 0] = torch.inf
    row = torch.arange(len(images), device=images.device)
    a, count = distance[row, own], sizes[own]
    if includes_itself:  # at distance 0
        a, count = a * count / (count - 1).clamp_min(1), count - 1
    distance[row, own] = torch.inf
    b = distance.min(dim=1).values
    larger = torch.maximum(a, b)
    known = (count > 0) & larger.isfinite() & (larger > 0)
    return float(((b - a) / larger.clamp_min(1e-9))[known].double().sum())
