"""HDBSCAN on sparse Jaccard distances: density clusters without one eps for all.

HDBSCAN (Campello, Moulavi and Sander, PAKDD 2013) runs DBSCAN at every eps at once and
keeps, of the tree of clusters that this makes, those that last longest. All it needs of the
distances is the minimum spanning tree of their mutual reachability. scikit-learn builds it
from a sparse graph too, but refuses one with short rows or several components. Here the
tree is made from the stored distances, and since one that is not stored is exactly 1, the
edges that join its components are known: the result is that of the dense distances.

``min_samples=4`` is what the field's DBSCAN recipes use. ``min_cluster_size=8`` suits
people seen 10 to 30 times: on synthetic features of 300 people it found about 300 clusters,
while 5, scikit-learn's default, found up to 540.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree
from sklearn.cluster import HDBSCAN
from torch import Tensor

from selcon_plugin.clustering.base import Labeler, register_labeler
from selcon_plugin.clustering.jaccard import jaccard_distance
from selcon_plugin.clustering.pseudo_labels import OUTLIER, PseudoLabels
from selcon_plugin.options import Choice, Interval


def mutual_reachability(
    distance: scipy.sparse.csr_array, min_samples: int
) -> scipy.sparse.csr_array:
    """Raise distances to the core distances of both images.

    The core distance of an image is that to its ``min_samples``-th nearest image, itself
    counted; the mutual reachability of two images is the largest of their distance and
    their two core distances.

    Args:
        distance: Symmetric, with a stored diagonal, shape ``(M, M)``; what is not stored
            is 1.
        min_samples: Neighbors, itself included, that set the core distance.

    Returns:
        Mutual reachability below 1, each pair once (row below column), float64 ``(M, M)``.
    """
    data = distance.data.astype(np.float64)
    bounds = distance.indptr
    core = np.ones(len(bounds) - 1)
    # Selection inside each row takes a hundredth of the time of sorting all rows at once.
    for image in np.flatnonzero(np.diff(bounds) >= min_samples):
        near = data[bounds[image] : bounds[image + 1]]
        core[image] = np.partition(near, min_samples - 1)[min_samples - 1]
    column = distance.indices.astype(np.int32, copy=False)  # as scipy's tree wants it
    row = np.repeat(np.arange(len(core), dtype=column.dtype), np.diff(bounds))
    reach = np.maximum(data, np.maximum(core[row], core[column]))
    kept = (reach < 1) & (row < column)
    return scipy.sparse.coo_array(
        (reach[kept], (row[kept], column[kept])), shape=distance.shape
    ).tocsr()


def hdbscan_labels(
    distance: scipy.sparse.csr_array,
    *,
    min_cluster_size: int,
    min_samples: int,
    cluster_selection: str = "eom",
) -> NDArray[np.int64]:
    """Cluster with HDBSCAN on sparse distances.

    Equals scikit-learn's ``HDBSCAN(metric="precomputed")`` on the dense array up to the
    order of equal distances, which the definition leaves open. Among distances of 1 the
    order here is such that images which share nothing never form a cluster: those that
    fewer than ``min_cluster_size`` are reachable from below 1 are outliers.

    Args:
        distance: Symmetric, with a stored diagonal, shape ``(M, M)``; what is not stored
            is 1.
        min_cluster_size: Images of the smallest cluster, at least 2.
        min_samples: Neighbors, itself included, that set the core distance.
        cluster_selection: ``"eom"`` (excess of mass: the most lasting clusters) or
            ``"leaf"`` (the smallest ones).

    Returns:
        Labels 0, 1, ..., -1 for an outlier, ``(M,)``.
    """
    labels = np.full(distance.shape[0], OUTLIER, dtype=np.int64)
    if not len(labels):
        return labels
    reach = mutual_reachability(distance, min_samples)
    tree = scipy.sparse.csr_array(minimum_spanning_tree(reach))
    _, component = connected_components(tree, directed=False)
    kept = np.flatnonzero(np.bincount(component)[component] >= min_cluster_size)
    if not len(kept):
        return labels
    _, first = np.unique(component[kept], return_index=True)
    first = first.astype(np.int32)
    chain = scipy.sparse.coo_array(
        (np.ones(len(first) - 1), (first[:-1], first[1:])), shape=(len(kept), len(kept))
    )
    tree = tree[kept][:, kept] + chain
    # The core distances are in the tree already: min_samples=1 leaves it as it is.
    model = HDBSCAN(
        min_cluster_size=min_cluster_size,
        min_samples=1,
        metric="precomputed",
        cluster_selection_method=cluster_selection,
        copy=False,
    )
    labels[kept] = model.fit(scipy.sparse.csr_matrix(tree + tree.T)).labels_
    return labels


@register_labeler("HDBSCAN")
class HDBSCANLabeler(Labeler):
    """HDBSCAN on the k-reciprocal Jaccard distance.

    Args:
        min_cluster_size: Images of the smallest cluster.
        min_samples: Neighbors, itself included, that make a dense place.
        cluster_selection: ``"eom"`` keeps the clusters that last longest over eps,
            ``"leaf"`` the smallest ones.
        k1: Neighbors in the Jaccard distance.
        k2: Neighbors averaged by its query expansion, 1 for none.
    """

    def __init__(
        self,
        *,
        min_cluster_size: Annotated[int, Interval(2)] = 8,
        min_samples: Annotated[int, Interval(1)] = 4,
        cluster_selection: Annotated[str, Choice(("eom", "leaf"))] = "eom",
        k1: Annotated[int, Interval(1)] = 30,
        k2: Annotated[int, Interval(1)] = 6,
    ) -> None:
        self.min_cluster_size = min_cluster_size
        self.min_samples = min_samples
        self.cluster_selection = cluster_selection
        self.k1 = k1
        self.k2 = k2

    def cluster(self, features: Tensor) -> PseudoLabels:
        """Compute the distances and cluster.

        Args:
            features: Unit vectors ``(M, C)``.

        Returns:
            Labels and the graph.
        """
        distance = jaccard_distance(features, k1=self.k1, k2=self.k2)
        labels = hdbscan_labels(
            distance,
            min_cluster_size=self.min_cluster_size,
            min_samples=self.min_samples,
            cluster_selection=self.cluster_selection,
        )
        return PseudoLabels.numbered(labels, distance=distance)
