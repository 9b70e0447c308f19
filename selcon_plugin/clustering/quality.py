"""Label-free quality metrics of clusterings."""

from __future__ import annotations

import math

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from scipy.special import gammaln
from torch import Tensor

from selcon_plugin.clustering.pseudo_labels import OUTLIER, PseudoLabels

# Largest number of entries in a product of distances and cluster memberships.
_CHUNK_ENTRIES = 20_000_000


def cluster_quality(
    pseudo_labels: PseudoLabels, previous: Tensor | None = None
) -> dict[str, float]:
    """Measure the quality of a clustering without identities.

    Args:
        pseudo_labels: Clusters of M images.
        previous: Labels of the same images from the previous epoch, int64 ``(M,)``, or
            None.

    Returns:
        ``num_clusters``, ``outlier_ratio``, ``mean_cluster_size``,
        ``median_cluster_size``, ``max_cluster_size`` (0 without clusters); ``silhouette``
        if there are distances and at least 2 clusters; ``stability`` if there are previous
        labels, see :func:`label_stability`.
    """
    sizes = pseudo_labels.sizes.numpy()
    if not len(sizes):
        sizes = np.zeros(1)
    quality = {
        "num_clusters": float(pseudo_labels.num_clusters),
        "outlier_ratio": pseudo_labels.outlier_ratio,
        "mean_cluster_size": float(sizes.mean()),
        "median_cluster_size": float(np.median(sizes)),
        "max_cluster_size": float(sizes.max()),
    }
    if pseudo_labels.distance is not None and pseudo_labels.num_clusters > 1:
        scores = silhouette_samples(pseudo_labels.distance, pseudo_labels.labels.numpy())
        quality["silhouette"] = float(np.nanmean(scores))
    if previous is not None:
        quality["stability"] = label_stability(pseudo_labels.labels, previous)
    return quality


def silhouette_samples(
    distance: scipy.sparse.csr_array, labels: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Compute the silhouette of every image on sparse distances.

    With a the mean distance to the other images of the own cluster and b the smallest mean
    distance to the images of another cluster, the silhouette is (b - a) / max(a, b), in
    [-1, 1]; it is 0 in a singleton. The result equals that of scikit-learn on the dense
    distances between the clustered images, but the cost grows with the stored entries, not
    with M².

    Args:
        distance: Symmetric matrix, shape ``(M, M)``; entries that are not stored are 1.
        labels: Cluster 0, 1, ... of each image without gaps, -1 for an outlier, ``(M,)``;
            at least 2 clusters.

    Returns:
        Float64 ``(M,)``, NaN for outliers.

    Example:
        >>> near = scipy.sparse.csr_array([[0, 0.5, 0], [0.5, 0, 0], [0, 0, 0]])
        >>> silhouette_samples(near, np.array([0, 0, 1])).tolist()
        [0.5, 0.5, 0.0]
    """
    inside = np.flatnonzero(labels >= 0)
    own = labels[inside]
    sizes = np.bincount(own)
    # Closeness 1 - d is 0 for missing entries, so cluster sums are sparse products.
    membership = scipy.sparse.csr_array(
        (np.ones(len(inside)), (inside, own)), shape=(len(labels), len(sizes))
    )
    result = np.full(len(labels), np.nan)
    per_row = max(1.0, distance.nnz / max(1, len(labels)))
    step = max(1, int(_CHUNK_ENTRIES / per_row))
    for start in range(0, len(inside), step):
        rows = inside[start : start + step]
        result[rows] = _silhouettes(distance[rows], rows, labels[rows], membership, sizes)
    return result


def _silhouettes(
    distance: scipy.sparse.csr_array,
    rows: NDArray[np.int64],
    own: NDArray[np.int64],
    membership: scipy.sparse.csr_array,
    sizes: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Compute the silhouettes of the images ``rows`` from their distance matrix rows."""
    closeness = distance.astype(np.float64)
    closeness.data = 1 - closeness.data
    # Self-pairs do not count, whatever the diagonal stores.
    closeness.data[closeness.indices == np.repeat(rows, np.diff(closeness.indptr))] = 0
    sums = (closeness @ membership).tocoo()  # (rows, clusters), only for stored pairs
    is_own = sums.col == own[sums.row]
    within = np.zeros(len(rows))
    within[sums.row[is_own]] = sums.data[is_own]
    a = 1 - within / np.maximum(1, sizes[own] - 1)
    best = np.zeros(len(rows))
    others = ~is_own
    np.maximum.at(best, sums.row[others], sums.data[others] / sizes[sums.col[others]])
    b = 1 - best
    score = np.divide(b - a, np.maximum(a, b), out=np.zeros_like(a), where=a + b > 0)
    score[sizes[own] == 1] = 0
    return score


def label_stability(labels: Tensor, previous: Tensor) -> float:
    """Compute the agreement of two epochs' clusters over the images clustered in both.

    Args:
        labels: Labels of this epoch, int64 ``(M,)`` on the CPU, -1 for an outlier.
        previous: Labels of the previous epoch, int64 ``(M,)``.

    Returns:
        Adjusted mutual information: 1 for equal clusters, about 0 for chance; NaN if no
        image is clustered in both.

    Raises:
        ValueError: If the two differ in length.
    """
    if labels.shape != previous.shape:
        raise ValueError(
            "labels and previous must be of the same images, got shapes "
            f"{tuple(labels.shape)} and {tuple(previous.shape)}"
        )
    both = (labels != OUTLIER) & (previous != OUTLIER)
    if not both.any():
        return math.nan
    return adjusted_mutual_info(labels[both].numpy(), previous[both].numpy())


def adjusted_mutual_info(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """Compute mutual information corrected for chance (Vinh et al., JMLR 2010).

    The result equals scikit-learn's ``adjusted_mutual_info_score``. The expected mutual
    information depends only on the cluster sizes, so it is summed over the distinct sizes:
    thousands of clusters take no longer than dozens.

    Args:
        first: Cluster of each item, any integers, ``(N,)``, N at least 1.
        second: The other partition, ``(N,)``.

    Returns:
        1 for equal partitions, about 0 for independent ones.
    """
    table = contingency(first, second)
    rows = np.asarray(table.sum(axis=1)).ravel()
    columns = np.asarray(table.sum(axis=0)).ravel()
    if len(rows) == len(columns) == table.nnz:
        return 1.0  # identical partitions; the ratio below could be 0 / 0
    total = len(first)
    joint = table.tocoo()
    information = float(
        (joint.data / total)
        @ np.log(joint.data * total / (rows[joint.row] * columns[joint.col]))
    )
    expected = _expected_information(rows, columns, total)
    normalizer = (_entropy(rows, total) + _entropy(columns, total)) / 2
    return (information - expected) / (normalizer - expected)


def contingency(
    first: NDArray[np.int64], second: NDArray[np.int64]
) -> scipy.sparse.csr_array:
    """Compute the contingency table of two partitions.

    Args:
        first: Cluster of each item, any integers, ``(N,)``.
        second: The other partition, ``(N,)``.

    Returns:
        Float64 counts, one row per cluster of ``first`` and one column per cluster of
        ``second``; entries that are not stored are 0.
    """
    _, row = np.unique(first, return_inverse=True)
    _, column = np.unique(second, return_inverse=True)
    shape = (int(row.max(initial=-1)) + 1, int(column.max(initial=-1)) + 1)
    counts = scipy.sparse.coo_array((np.ones(len(row)), (row, column)), shape=shape)
    return counts.tocsr()  # sums duplicate entries


def _entropy(sizes: NDArray[np.float64], total: int) -> float:
    return float(-(sizes / total) @ np.log(sizes / total))


def _expected_information(
    rows: NDArray[np.float64], columns: NDArray[np.float64], total: int
) -> float:
    """Return the mean mutual information over all partitions with these cluster sizes."""
    row_sizes, row_counts = np.unique(rows.astype(np.int64), return_counts=True)
    column_sizes, column_counts = np.unique(columns.astype(np.int64), return_counts=True)
    log_factorial = gammaln(np.arange(total + 2) + 1.0)
    expected = 0.0
    for size, count in zip(row_sizes.tolist(), row_counts.tolist(), strict=True):
        # All possible overlaps with each column size, concatenated.
        low = np.maximum(1, size + column_sizes - total)
        lengths = np.minimum(size, column_sizes) - low + 1
        which = np.repeat(np.arange(len(column_sizes)), lengths)
        overlap = np.arange(len(which)) - (np.cumsum(lengths) - lengths - low)[which]
        other = column_sizes[which]
        # Hypergeometric probability of the overlap.
        log_probability = (
            log_factorial[size]
            + log_factorial[other]
            + log_factorial[total - size]
            + log_factorial[total - other]
            - log_factorial[total]
            - log_factorial[overlap]
            - log_factorial[size - overlap]
            - log_factorial[other - overlap]
            - log_factorial[total - size - other + overlap]
        )
        information = overlap / total * np.log(overlap * total / (size * other))
        expected += count * float(
            column_counts[which] @ (information * np.exp(log_probability))
        )
    return expected
