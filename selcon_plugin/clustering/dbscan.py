"""DBSCAN on sparse Jaccard distances, as in SpCL, Cluster Contrast and their kin."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from selcon_plugin.clustering.auto_eps import EPS_GRID, choose_eps
from selcon_plugin.clustering.base import Labeler, register_labeler
from selcon_plugin.clustering.jaccard import jaccard_distance
from selcon_plugin.clustering.neighborhood import NeighborhoodSizes
from selcon_plugin.clustering.pseudo_labels import OUTLIER, PseudoLabels
from selcon_plugin.options import Interval


def dbscan_labels(
    distance: scipy.sparse.csr_array, eps: float, min_samples: int
) -> NDArray[np.int64]:
    """Cluster with DBSCAN (Ester et al., KDD 1996) on sparse distances.

    An image is a core image if at least ``min_samples`` images, itself among them, lie
    within ``eps``. Core images within ``eps`` of each other share a cluster; another image
    joins the first numbered of the clusters with a core image within ``eps``. Clusters are
    numbered by their first core image. Equals scikit-learn's ``DBSCAN(eps=eps,
    min_samples=min_samples, metric="precomputed")`` on the same array, numbers included.

    Args:
        distance: Symmetric, shape ``(M, M)``; what is not stored is farther than ``eps``,
            but for the diagonal, which need not be stored.
        eps: Largest distance of neighbors, at least 0.
        min_samples: Neighbors, itself included, that make a core image; at least 1.

    Returns:
        Labels 0, 1, ..., -1 for an outlier, ``(M,)``.

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
    # A Python number is compared in the data's precision, a NumPy scalar in its own.
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
    """Number names 0, 1, ... in the order in which they first occur."""
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
        eps: Largest Jaccard distance of neighbors, or "auto" to find it without labels,
            see :func:`~selcon_plugin.clustering.auto_eps.choose_eps`.
        min_samples: Neighbors, itself included, that make a core image; "auto" for 3 below
            1,000 images and 4 from there on.
        k1: Neighbors in the Jaccard distance; "auto" for a tenth of the images, but 8 to
            15, below 1,000 images and 30 from there on.
        k2: Neighbors averaged by its query expansion, 1 for none; "auto" for a fifth of
            what is "auto" for k1.
        graph_margin: The graph in ``PseudoLabels.distance`` keeps distances up to ``eps +
            graph_margin`` (with "auto" the largest eps tried); filters and silhouette see
            larger ones as 1.
    """

    def __init__(
        self,
        *,
        eps: Annotated[float | Literal["auto"], Interval(0, 1, above=True)] = 0.6,
        min_samples: Annotated[int | Literal["auto"], Interval(1)] = 4,
        k1: Annotated[int | Literal["auto"], Interval(1)] = 30,
        k2: Annotated[int | Literal["auto"], Interval(1)] = 6,
        graph_margin: Annotated[float, Interval(0, 1)] = 0.1,
    ) -> None:
        self.eps = eps
        self.min_samples = min_samples
        self.k1 = k1
        self.k2 = k2
        self.graph_margin = graph_margin

    def cluster(self, features: Tensor) -> PseudoLabels:
        """Compute the distances, find eps if asked to, and cluster.

        Args:
            features: Unit vectors ``(M, C)``.

        Returns:
            Labels, the graph, and ``eps`` in ``measured``.
        """
        reach = self.graph_margin + (EPS_GRID[-1] if self.eps == "auto" else self.eps)
        sizes = self._sizes(len(features))
        distance = jaccard_distance(
            features, k1=sizes.k1, k2=sizes.k2, max_distance=reach if reach < 1 else None
        )
        eps, labels_at = self.eps, partial(self._labels_at, distance)
        if eps == "auto":
            eps = choose_eps(distance, labels_at, sizes.min_samples)
        labels = labels_at(eps)
        return PseudoLabels.numbered(labels, distance=distance, measured={"eps": eps})

    def num_neighbors(self, num_images: int) -> int:
        """Tell how many neighbors of each image are looked up, for estimates.

        Args:
            num_images: Images M.

        Returns:
            The option k1, or what it is for that many images.
        """
        return self._sizes(num_images).k1

    def check_reach(self, eps_change: float) -> None:
        """Refuse a change of eps beyond the graph.

        Args:
            eps_change: Largest change that will be asked for.

        Raises:
            ValueError: If the graph does not reach that far.
        """
        if eps_change > self.graph_margin:
            raise ValueError(
                f"the graph holds distances up to eps + {self.graph_margin:g}, but eps + "
                f"{eps_change:g} is asked for: raise graph_margin to {eps_change:g} "
                "(GRAPH_MARGIN; the filter of RELIABILITY asks)"
            )

    def labels_at(self, pseudo_labels: PseudoLabels, eps_change: float) -> Tensor:
        """Cluster the same graph again with another eps, see the base class.

        Args:
            pseudo_labels: What :meth:`cluster` found.
            eps_change: Added to its eps.

        Returns:
            Labels, int64 ``(M,)``.

        """
        self.check_reach(eps_change)
        eps = max(0.0, pseudo_labels.measured["eps"] + eps_change)
        return torch.from_numpy(self._labels_at(pseudo_labels.distance, eps))

    def _labels_at(self, distance: scipy.sparse.csr_array, eps: float) -> NDArray[np.int64]:
        return dbscan_labels(distance, eps, self._sizes(distance.shape[0]).min_samples)

    def _sizes(self, num_images: int) -> NeighborhoodSizes:
        sizes = NeighborhoodSizes.for_images(num_images)
        given = {name: getattr(self, name) for name in vars(sizes)}
        return replace(sizes, **{n: value for n, value in given.items() if value != "auto"})
