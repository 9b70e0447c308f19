"""DBSCAN on sparse Jaccard distances, as in SpCL, Cluster Contrast and related methods."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from selcon_plugin.clustering.auto_eps import EPS_GRID, choose_eps
from selcon_plugin.clustering.auto_sizes import AutoSizes
from selcon_plugin.clustering.base import Labeler, register_labeler
from selcon_plugin.clustering.copies import distances_with_copies
from selcon_plugin.clustering.pseudo_labels import OUTLIER, PseudoLabels
from selcon_plugin.options import Interval


def dbscan_labels(
    distance: scipy.sparse.csr_array, eps: float, min_samples: int
) -> NDArray[np.int64]:
    """Cluster with DBSCAN (Ester et al., KDD 1996) on sparse distances.

    An image is a core image if at least ``min_samples`` images, including itself, lie
    within ``eps``. Core images within ``eps`` of each other share a cluster; any other
    image joins the lowest-numbered cluster that has a core image within ``eps``. Clusters
    are numbered by their first core image. The result equals that of scikit-learn's
    ``DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed")`` on the same array,
    including the cluster numbers.

    Args:
        distance: Symmetric matrix, shape ``(M, M)``; entries that are not stored lie beyond
            ``eps``, except on the diagonal, which need not be stored.
        eps: Largest distance between neighbors, at least 0.
        min_samples: Neighbors, including the image itself, that make a core image; at
            least 1.

    Returns:
        Labels 0, 1, ..., and -1 for outliers, ``(M,)``.

    Raises:
        ValueError: If ``eps`` or ``min_samples`` is out of range.

    Example:
        >>> near = scipy.sparse.csr_array([[0, 0.5, 0], [0.5, 0, 0], [0, 0, 0]])
        >>> dbscan_labels(near, 0.6, 2).tolist()
        [0, 0, -1]
    """
    if not eps >= 0:
        raise ValueError(f"eps must be a number >= 0, got {eps}")
    if min_samples < 1:
        raise ValueError(f"min_samples must be 1 or more, got {min_samples}")
    num_images = distance.shape[0]
    # A Python float is compared in the data's precision, a NumPy scalar in its own.
    kept = np.flatnonzero(distance.data <= float(eps))
    row = np.searchsorted(distance.indptr, kept, side="right") - 1
    column = distance.indices[kept]
    between = row != column
    row, column = row[between], column[between]
    core = np.bincount(row, minlength=num_images) + 1 >= min_samples

    both = core[row] & core[column]
    links = scipy.sparse.coo_array(
        (np.ones(int(both.sum()), dtype=np.int8), (row[both], column[both])),
        shape=distance.shape,
    )
    _, component = connected_components(links, directed=False)
    labels = np.full(num_images, OUTLIER, dtype=np.int64)
    labels[core] = _number_by_first(component[core])

    border = ~core[row] & core[column]
    joined = np.full(num_images, num_images, dtype=np.int64)
    np.minimum.at(joined, row[border], labels[column[border]])
    found = joined < num_images
    labels[found] = joined[found]
    return labels


def _number_by_first(names: NDArray[np.int32]) -> NDArray[np.int64]:
    """Renumber ``names`` 0, 1, ... in order of first occurrence."""
    _, first, inverse = np.unique(names, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


@register_labeler("DBSCAN")
class DBSCANLabeler(Labeler):
    """DBSCAN on the k-reciprocal Jaccard distance.

    The defaults are those of Cluster Contrast (Dai et al., ACCV 2022). ``measured["eps"]``
    holds the eps that was used.

    Args:
        eps: Largest Jaccard distance between neighbors, or "auto" for unsupervised
            selection, see :func:`~selcon_plugin.clustering.auto_eps.choose_eps`.
        min_samples: Neighbors, including the image itself, that make a core image; "auto"
            means 2 to 4, by the images per person.
        k1: Neighbors in the Jaccard distance; "auto" means 1.75 times the images per
            person, within 4..30; see
            :class:`~selcon_plugin.clustering.neighborhood.NeighborhoodSizes`.
        k2: Neighbors averaged by query expansion, 1 for none; "auto" means a quarter of the
            "auto" value of k1.
        images_per_person: About how many images show the same person, which determines what
            is "auto"; "auto" itself means an estimate, see
            :func:`~selcon_plugin.clustering.auto_threshold.estimate_images_per_person`.
        graph_margin: Width by which the graph in ``PseudoLabels.distance`` extends beyond
            ``eps`` (with "auto" beyond the largest eps tried); filters and silhouette treat
            larger distances as 1.
    """

    def __init__(
        self,
        *,
        eps: Annotated[float | Literal["auto"], Interval(0, 1, above=True)] = 0.6,
        min_samples: Annotated[int | Literal["auto"], Interval(1)] = 4,
        k1: Annotated[int | Literal["auto"], Interval(1)] = 30,
        k2: Annotated[int | Literal["auto"], Interval(1)] = 6,
        graph_margin: Annotated[float, Interval(0, 1)] = 0.1,
        images_per_person: Annotated[float | Literal["auto"], Interval(1)] = "auto",
    ) -> None:
        self.auto_sizes = AutoSizes(
            images_per_person, {"k1": k1, "k2": k2, "min_samples": min_samples}
        )
        self.eps = eps
        self.min_samples = min_samples
        self.k1 = k1
        self.k2 = k2
        self.graph_margin = graph_margin

    def cluster(self, features: Tensor) -> PseudoLabels:
        """Compute the distances, choose eps if it is "auto", and cluster.

        Args:
            features: Unit vectors ``(M, C)``.

        Returns:
            The labels, the graph, and ``eps`` in ``measured``.
        """
        reach = self.graph_margin + (EPS_GRID[-1] if self.eps == "auto" else self.eps)
        sizes, measured = self.auto_sizes.choose(features)
        distance = distances_with_copies(
            features, k1=sizes.k1, k2=sizes.k2, max_distance=reach if reach < 1 else None
        )
        eps = self.eps
        labels_at = partial(dbscan_labels, distance, min_samples=sizes.min_samples)
        if eps == "auto":
            eps = choose_eps(distance, labels_at, sizes.min_samples)
        labels = labels_at(eps)
        measured["eps"] = eps
        return PseudoLabels.numbered(labels, distance=distance, measured=measured)

    def smallest_cluster(self, found: PseudoLabels) -> int:
        """Return min_samples, or its "auto" value, at least 2.

        Args:
            found: Output of :meth:`cluster`.
        """
        return max(2, self.auto_sizes.chosen(found.measured).min_samples)

    def check_reach(self, eps_change: float) -> None:
        """Refuse a change of eps that exceeds the graph margin.

        Args:
            eps_change: Largest change that will be requested.

        Raises:
            ValueError: If the graph does not store distances that large.
        """
        if eps_change > self.graph_margin:
            raise ValueError(
                f"the graph stores distances up to eps + {self.graph_margin:g}, but the "
                f"filter of RELIABILITY needs them up to eps + {eps_change:g}: raise "
                f"graph_margin (GRAPH_MARGIN) to {eps_change:g}"
            )

    def labels_at(self, pseudo_labels: PseudoLabels, eps_change: float) -> Tensor:
        """Cluster the same graph with a different eps; see the base class.

        Args:
            pseudo_labels: Output of :meth:`cluster`.
            eps_change: Value added to its eps.

        Returns:
            Labels, int64 ``(M,)``.
        """
        self.check_reach(eps_change)
        eps = max(0.0, pseudo_labels.measured["eps"] + eps_change)
        sizes = self.auto_sizes.chosen(pseudo_labels.measured)
        return torch.from_numpy(
            dbscan_labels(pseudo_labels.distance, eps, sizes.min_samples)
        )
