"""Average linkage on sparse distances: the whole hierarchy of merges, and its cuts.

The two clusters with the smallest average distance are merged repeatedly until no pair is
closer than a threshold: hierarchical clustering as in HCT (Zeng et al., CVPR 2020).

A distance that is not stored is 1, so the average distance of two clusters is
``1 - S(A, B) / (|A| |B|)`` with S the sum of ``1 - distance`` over the stored pairs between
them. S is additive when clusters merge, so no other pair is needed. Two clusters that are
each other's nearest can be merged immediately, in any order and together with other such
pairs, since with average linkage a merged cluster is never closer to a third one than the
nearer of its two parts was (reciprocal agglomerative clustering, Sumengen et al., arXiv
2105.11653). A few dozen rounds of array operations therefore replace the sequence of single
merges and give the same result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

# Similarities are integers in units of 2^-24, the spacing of float32 between 0.5 and 1:
# integer sums do not depend on their order, so both directions of a pair stay equal. The
# sum between two halves of a set fits into int64 up to 1.4 million images.
_STEPS = 2**24


def _pair_code(
    first: NDArray[np.integer[Any]], second: NDArray[np.integer[Any]]
) -> NDArray[np.uint64]:
    """Return a pseudo-random number for each unordered pair, unique per pair."""
    low = np.minimum(first, second).astype(np.uint64)
    high = np.maximum(first, second).astype(np.uint64)
    code: NDArray[np.uint64] = (low << np.uint64(32)) | high
    # Multiplication by an odd number and the shifted xor are bijective.
    code ^= code >> np.uint64(31)
    code *= np.uint64(0x9E3779B97F4A7C15)
    code ^= code >> np.uint64(29)
    return code


def _nearest_clusters(
    graph: scipy.sparse.csr_array, size: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Find the nearest other cluster of each cluster.

    Ties are broken by the smallest pair code, so that many tied pairs choose each other.

    Args:
        graph: Summed similarity of each pair of clusters; the diagonal is set to 0 here.
        size: Number of images in each cluster.

    Returns:
        Largest average similarity of each cluster, 0 for a cluster without neighbors, and
        the index of the nearest cluster.
    """
    counts = np.diff(graph.indptr)
    present = np.flatnonzero(counts)
    column = graph.indices
    row = np.repeat(np.arange(len(counts), dtype=column.dtype), counts)
    graph.data[row == column] = 0
    similarity = graph.data / (size[row] * size[column])
    best = np.zeros(len(counts))
    best[present] = np.maximum.reduceat(similarity, graph.indptr[present])
    tied = np.flatnonzero(similarity == best[row])
    row, column = row[tied], column[tied]
    order = np.lexsort((_pair_code(row, column), row))
    row, column = row[order], column[order]
    starts = np.flatnonzero(np.diff(row, prepend=-1))
    nearest = np.arange(len(counts))
    nearest[row[starts]] = column[starts]
    return best / _STEPS, nearest


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """Merges of average linkage, in no particular order.

    Attributes:
        first: An image of one of the two merged clusters, int64 ``(N,)``.
        second: An image of the other one, int64 ``(N,)``.
        height: Average distance of the two clusters, float64 ``(N,)``, in 0..1. A merge is
            never lower than the merges that built its two clusters.
        num_images: Number of images M.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    height: NDArray[np.float64]
    num_images: int

    def cut(self, threshold: float) -> NDArray[np.int64]:
        """Return the clusters after all merges up to a height.

        Args:
            threshold: Largest average distance at which clusters are merged.

        Returns:
            Cluster of each image, 0, 1, ..., ``(M,)``; there are no outliers.
        """
        kept = self.height <= threshold
        joined = scipy.sparse.coo_array(
            (
                np.ones(int(kept.sum()), dtype=np.int8),
                (self.first[kept], self.second[kept]),
            ),
            shape=(self.num_images, self.num_images),
        )
        labels: NDArray[np.int64] = connected_components(joined, directed=False)[1]
        return labels.astype(np.int64)


def average_linkage(distance: scipy.sparse.csr_array, threshold: float = 1.0) -> Hierarchy:
    """Merge clusters while their average distance is at most a threshold.

    Except for the order of equal distances, these are the merges of SciPy's
    ``linkage(..., "average")`` on the dense array.

    Args:
        distance: Symmetric matrix, shape ``(M, M)``; entries that are not stored are 1.
            Distances are rounded to multiples of 2^-24.
        threshold: Largest average distance at which clusters are merged. Clusters without a
            stored pair between them are never merged.

    Returns:
        The merges.
    """
    total = np.rint((1 - distance.data.astype(np.float64)) * _STEPS).astype(np.int64)
    graph = scipy.sparse.csr_array(
        (total, distance.indices, distance.indptr), shape=distance.shape
    )
    active = np.arange(distance.shape[0])  # one image of each cluster still in play
    size = np.ones_like(active)
    merges = [np.empty((2, 0), dtype=np.int64)]  # image pairs whose clusters were merged
    heights = [np.empty(0)]
    while graph.nnz:
        best, nearest = _nearest_clusters(graph, size)
        # A cluster that cannot be merged now never can: it is removed with its pairs.
        is_open = (best > 0) & (1 - best <= threshold)
        own = np.arange(len(active))
        first = np.flatnonzero(is_open & (nearest[nearest] == own) & (own < nearest))
        if not len(first):
            break
        second = nearest[first]
        merges.append(np.stack([active[first], active[second]]))
        heights.append(1 - best[first])
        size[first] += size[second]
        is_open[second] = False
        stays = np.flatnonzero(is_open)
        active, size = active[stays], size[stays]
        # Row i of `join` marks the new cluster that contains the old cluster i.
        new = np.arange(len(stays))
        old, new = np.r_[stays, second], np.r_[new, np.searchsorted(stays, first)]
        join = scipy.sparse.coo_array(
            (np.ones_like(old), (old, new)), shape=(len(own), len(stays))
        ).tocsr()
        graph = join.T.tocsr() @ (graph @ join)
    first, second = np.concatenate(merges, axis=1)
    return Hierarchy(first, second, np.concatenate(heights), distance.shape[0])


def average_linkage_labels(
    distance: scipy.sparse.csr_array, threshold: float
) -> NDArray[np.int64]:
    """Merge clusters while their average distance is at most a threshold.

    Except for the order of equal distances, this is the partition that SciPy's
    ``linkage(..., "average")`` and ``fcluster(..., threshold, "distance")`` find on the
    dense array.

    Args:
        distance: See :func:`average_linkage`.
        threshold: See :func:`average_linkage`.

    Returns:
        Cluster of each image, 0, 1, ..., ``(M,)``; there are no outliers.

    Example:
        >>> near = scipy.sparse.csr_array([[0, 0.2, 0], [0.2, 0, 0.9], [0, 0.9, 0]])
        >>> average_linkage_labels(near, 0.5).tolist()
        [0, 0, 1]
    """
    return average_linkage(distance, threshold).cut(threshold)
