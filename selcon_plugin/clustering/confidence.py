r"""Calibrated probability that a cluster shows one person, and cohesion of clusters.

Both are computed from the multi-scale Jaccard distance, whatever labeler found the
clusters. Let :math:`s_i` be the mean closeness (1 - distance) of image i to the others of
its cluster, n the size of the cluster, and S the mean silhouette of the whole clustering.
The confidence is

.. math:: \sigma(6.6\, s_i + 0.75 \ln n + 9.4\, S - 5.2),

the probability that another image of the cluster, chosen at random, shows the same person.
S measures how far persons are apart at all for this network, so a weak network has low
confidences everywhere. The coefficients are those of a logistic regression on 48 folders of
Market-1501's training identities with two networks; on folders of the test identities the
expected calibration error is stated in docs/benchmarks/folders.md.

Shape shorthand in this module:

    M: images
    K: clusters
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray

from selcon_plugin.clustering.auto_threshold import mean_silhouette
from selcon_plugin.clustering.linkage import average_linkage
from selcon_plugin.clustering.multi_scale import without_mean
from selcon_plugin.clustering.pseudo_labels import OUTLIER, outliers_as_singletons

_CLOSENESS, _LOG_SIZE, _SILHOUETTE, _CONSTANT = 6.6, 0.75, 9.4, -5.2


def pair_confidence(
    features: torch.Tensor, distance: Any, labels: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Estimate how probable it is that an image shows the person of its cluster.

    Args:
        features: Unit vectors ``(M, C)``, as they were clustered, on any device.
        distance: Result of
            :func:`~selcon_plugin.clustering.multi_scale.multi_scale_distance` for them.
        labels: Cluster of each image, -1 for an outlier, ``(M,)``.

    Returns:
        The probability that another image of the cluster, chosen at random, shows the same
        person, float32 ``(M,)``; 0 for outliers and in a cluster of one image.
    """
    inside = labels != OUTLIER
    sizes = np.bincount(labels[inside], minlength=1)
    size = np.where(inside, sizes[np.where(inside, labels, 0)], 1)
    row, closeness = _pairs_inside(distance, labels)[::2]
    sums = np.bincount(row, weights=closeness, minlength=len(labels))
    mean = sums / np.maximum(size - 1, 1)
    silhouette = mean_silhouette(without_mean(features), outliers_as_singletons(labels))
    score = _CLOSENESS * mean + _LOG_SIZE * np.log(size)
    score += _SILHOUETTE * silhouette + _CONSTANT
    confidence = 1 / (1 + np.exp(-score))
    return np.where(size > 1, confidence, 0).astype(np.float32)


def cohesion(distance: Any, labels: NDArray[np.int64]) -> NDArray[np.float32]:
    """Measure whether each cluster has one center, or several.

    A cluster is merged by average linkage from its images. Its cohesion is the closeness of
    the two parts that are merged last, divided by the mean closeness of all its pairs: 1 if
    no two parts are farther from each other than images are on average, near 0 if it
    consists of groups that have little in common.

    Args:
        distance: See :func:`pair_confidence`.
        labels: Clusters 0..K-1, -1 for an outlier, ``(M,)``.

    Returns:
        Float32 ``(K,)``, in 0..1; 0 for a cluster of one image.
    """
    num_clusters = int(labels.max(initial=OUTLIER)) + 1
    sizes = np.bincount(labels[labels != OUTLIER], minlength=num_clusters)
    row, column, closeness = _pairs_inside(distance, labels)
    inner = scipy.sparse.csr_array(
        (1 - closeness, (row, column)), shape=(len(labels), len(labels))
    )
    hierarchy = average_linkage(inner)
    own = labels[hierarchy.first]
    last = np.zeros(num_clusters)
    np.maximum.at(last, own, hierarchy.height)
    # Parts without a common neighbor are never merged.
    whole = np.bincount(own, minlength=num_clusters) == sizes - 1
    sums = np.bincount(labels[row], weights=closeness, minlength=num_clusters)
    mean = sums / np.maximum(sizes * (sizes - 1), 1)
    ratio = np.where(whole & (sizes > 1), (1 - last) / np.maximum(mean, 1e-6), 0)
    return np.clip(ratio, 0, 1).astype(np.float32)


def _pairs_inside(
    distance: Any, labels: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return the stored pairs within clusters, in both directions, and their closeness."""
    row = np.repeat(np.arange(len(labels)), np.diff(distance.indptr))
    column = distance.indices.astype(np.int64)
    kept = np.flatnonzero(
        (row != column) & (labels[row] == labels[column]) & (labels[row] != OUTLIER)
    )
    return row[kept], column[kept], 1 - distance.data[kept].astype(np.float64)
