"""Agglomerative clustering with average linkage on sparse Jaccard distances.

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

On synthetic features the default threshold of 0.8 gave about as many clusters as DBSCAN
with an eps of 0.6, the most common setting in the literature.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from selcon_plugin.clustering.base import Labeler, register_labeler
from selcon_plugin.clustering.copies import distances_with_copies
from selcon_plugin.clustering.pseudo_labels import OUTLIER, PseudoLabels
from selcon_plugin.options import Interval

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


def average_linkage_labels(
    distance: scipy.sparse.csr_array, threshold: float
) -> NDArray[np.int64]:
    """Merge clusters while their average distance is at most a threshold.

    Except for the order of equal distances, this is the partition that SciPy's
    ``linkage(..., "average")`` and ``fcluster(..., threshold, "distance")`` find on the
    dense array.

    Args:
        distance: Symmetric matrix, shape ``(M, M)``; entries that are not stored are 1.
            Distances are rounded to multiples of 2^-24.
        threshold: Largest average distance at which clusters are merged. Clusters without a
            stored pair between them are never merged.

    Returns:
        Cluster of each image, 0, 1, ..., ``(M,)``; there are no outliers.

    Example:
        >>> near = scipy.sparse.csr_array([[0, 0.2, 0], [0.2, 0, 0.9], [0, 0.9, 0]])
        >>> average_linkage_labels(near, 0.5).tolist()
        [0, 0, 1]
    """
    total = np.rint((1 - distance.data.astype(np.float64)) * _STEPS).astype(np.int64)
    graph = scipy.sparse.csr_array(
        (total, distance.indices, distance.indptr), shape=distance.shape
    )
    active = np.arange(distance.shape[0])  # one image of each cluster still in play
    size = np.ones_like(active)
    merges = [np.empty((2, 0), dtype=np.int64)]  # image pairs whose clusters were merged
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
    links = np.concatenate(merges, axis=1)
    joined = scipy.sparse.coo_array(
        (np.ones(links.shape[1], dtype=np.int8), tuple(links)), shape=distance.shape
    )
    labels: NDArray[np.int64] = connected_components(joined, directed=False)[1]
    return labels.astype(np.int64)


@register_labeler("Agglomerative")
class AgglomerativeLabeler(Labeler):
    """Average linkage on the k-reciprocal Jaccard distance.

    Args:
        threshold: Largest average Jaccard distance at which clusters are merged.
        min_cluster_size: Images in the smallest cluster; images of smaller ones are
            outliers.
        k1: Neighbors in the Jaccard distance.
        k2: Neighbors averaged by query expansion, 1 for none.
    """

    def __init__(
        self,
        *,
        threshold: Annotated[float, Interval(0, 1, above=True)] = 0.8,
        min_cluster_size: Annotated[int, Interval(1)] = 4,
        k1: Annotated[int, Interval(1)] = 30,
        k2: Annotated[int, Interval(1)] = 6,
    ) -> None:
        self.threshold = threshold
        self.min_cluster_size = min_cluster_size
        self.k1 = k1
        self.k2 = k2

    def cluster(self, features: Tensor) -> PseudoLabels:
        """Compute the distances, merge clusters, and drop small ones.

        Args:
            features: Unit vectors ``(M, C)``.

        Returns:
            The labels and the graph, which stores every distance below 1.
        """
        distance = distances_with_copies(features, k1=self.k1, k2=self.k2)
        labels = average_linkage_labels(distance, self.threshold)
        labels[np.bincount(labels)[labels] < self.min_cluster_size] = OUTLIER
        return PseudoLabels.numbered(labels, distance=distance)
