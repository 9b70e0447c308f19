"""Cluster ensembles: several clusterings of the same images and their agreement.

MGCE-HCL (Sun, Li and Li, "Hybrid Contrastive Learning with Cluster Ensemble", ACPR 2021,
arXiv 2201.11995) clusters the same features at several granularities: the more clusterings
put two images together, the more weight the pair gets. Its abstract gives no more details;
the middle eps is that of Cluster Contrast, the step of 0.02 that of SpCL.

The co-association of two images is the fraction of the clusterings in which they share a
cluster. It is never stored for all pairs: it exceeds a limit exactly if the images share a
cluster in every member of some smallest sufficient subset of the clusterings, so it is
enough to group the images by their labels in those subsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import combinations
from typing import Annotated, Any, Literal

import numpy as np
import scipy.sparse
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from selcon_plugin.clustering.auto_eps import EPS_GRID, choose_eps
from selcon_plugin.clustering.base import Labeler, register_labeler
from selcon_plugin.clustering.copies import distances_with_copies
from selcon_plugin.clustering.dbscan import dbscan_labels
from selcon_plugin.clustering.pseudo_labels import OUTLIER, PseudoLabels
from selcon_plugin.options import Interval

Labelings = Sequence[ArrayLike] | NDArray[np.int64]

# The graph extends as far as that of the DBSCAN labeler: silhouettes stay comparable.
_GRAPH_MARGIN = 0.1


def _as_array(labelings: Labelings) -> NDArray[np.int64]:
    array = np.asarray(labelings, dtype=np.int64)
    if array.ndim != 2 or not len(array):
        raise ValueError(
            "labelings must hold one or more clusterings of the same images, shape (T, M), "
            f"got shape {array.shape}"
        )
    return array


def _number_tuples(columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number the columns, which hold no negatives, so that equal ones share a number."""
    number = np.zeros(columns.shape[1], dtype=np.int64)
    for row in columns:
        key = number * (row.max(initial=0) + 1) + row
        number = np.unique(key, return_inverse=True)[1]
    return number


def co_association(
    labelings: Labelings, first: ArrayLike, second: ArrayLike
) -> NDArray[np.float64]:
    """Return the fraction of clusterings in which two images share a cluster.

    An outlier shares a cluster with no image.

    Args:
        labelings: T clusterings, -1 for an outlier, shape ``(T, M)``.
        first: Image indices, of any shape.
        second: Image indices to compare ``first`` with; shapes are broadcast, so
            ``batch[:, None], batch`` gives all pairs of a batch.

    Returns:
        Fractions in [0, 1], in the broadcast shape.

    Example:
        >>> co_association([[0, 0, 1], [0, 0, 0]], [0, 0], [1, 2]).tolist()
        [1.0, 0.5]
    """
    array = _as_array(labelings)
    first, second = np.broadcast_arrays(first, second)
    one, other = array[:, first], array[:, second]
    result: NDArray[np.float64] = ((one == other) & (one != OUTLIER)).mean(axis=0)
    return result


def agreement_labels(labelings: Labelings, agreement: float) -> NDArray[np.int64]:
    """Connect images whose co-association exceeds a limit; return connected components.

    Args:
        labelings: T clusterings, -1 for an outlier, shape ``(T, M)``.
        agreement: Limit, in [0, 1): 0.5 requires more than half of the clusterings.

    Returns:
        Connected components of the pairs above the limit, numbered with gaps; -1 for an
        image in no pair, ``(M,)``.

    Raises:
        ValueError: If ``agreement`` is out of range.
    """
    array = _as_array(labelings)
    if not 0 <= agreement < 1:
        raise ValueError(f"agreement must be >= 0 and < 1, got {agreement}")
    num_labelings, num_images = array.shape
    fractions = np.arange(num_labelings + 1) / num_labelings
    needed = int(np.argmax(fractions > agreement))  # size of the smallest subsets
    links = []  # from each image to one with the same labels
    for chosen in combinations(range(num_labelings), needed):
        inside = np.flatnonzero((array[list(chosen)] != OUTLIER).all(axis=0))
        group = _number_tuples(array[list(chosen)][:, inside])
        head = np.empty_like(inside)  # one image of each group
        head[group] = inside
        links.append(np.stack([inside, head[group]]))
    image, head = np.concatenate(links, axis=1)
    graph = scipy.sparse.coo_array(
        (np.ones(len(image), dtype=np.int8), (image, head)), shape=(num_images, num_images)
    )
    labels: NDArray[np.int64] = connected_components(graph, directed=False)[1].astype(
        np.int64
    )
    labels[np.bincount(labels)[labels] < 2] = OUTLIER
    return labels


def cluster_agreement(labelings: Labelings, labels: ArrayLike) -> NDArray[np.float64]:
    """Average each image's co-association with the other images of its cluster.

    Args:
        labelings: T clusterings, -1 for an outlier, shape ``(T, M)``.
        labels: Clusters to evaluate, -1 for an outlier, shape ``(M,)``.

    Returns:
        Fractions in [0, 1], ``(M,)``; 0 for an outlier and for a singleton.
    """
    array = _as_array(labelings)
    own = np.asarray(labels, dtype=np.int64)
    shared = np.zeros(array.shape)  # others of the own cluster, in each clustering
    for row, labeling in zip(shared, array, strict=True):
        inside = np.flatnonzero((own != OUTLIER) & (labeling != OUTLIER))
        group = _number_tuples(np.stack([own, labeling])[:, inside])
        row[inside] = np.bincount(group)[group] - 1
    others = np.zeros(array.shape[1])
    inside = own != OUTLIER
    others[inside] = np.bincount(own[inside])[own[inside]] - 1
    result: NDArray[np.float64] = shared.mean(axis=0) / np.maximum(others, 1)
    return result


@register_labeler("Ensemble")
class EnsembleLabeler(Labeler):
    """Consensus of three DBSCAN clusterings with different eps on one Jaccard graph.

    The three clusterings are kept in ``labelings``, for :func:`co_association`.
    ``measured["agreement"]`` is the average co-association of clustered images with the
    rest of their cluster: 1 if the three clusterings are identical.

    Args:
        eps: Middle eps; the others are ``eps - delta`` and ``eps + delta``. "auto" selects
            it without labels, see :func:`~selcon_plugin.clustering.auto_eps.choose_eps`.
        delta: Step between consecutive eps.
        min_samples: Neighbors, including the image itself, that make a core image.
        agreement: Limit below 1; images are connected if they share a cluster in more than
            this fraction of the clusterings.
        k1: Neighbors in the Jaccard distance.
        k2: Neighbors averaged by query expansion, 1 for none.

    Raises:
        ValueError: If ``agreement`` is 1, or ``eps - delta`` or ``eps + delta`` leaves
            (0, 1).
    """

    def __init__(
        self,
        *,
        eps: Annotated[float | Literal["auto"], Interval(0, 1, above=True)] = 0.6,
        delta: Annotated[float, Interval(0, 1)] = 0.02,
        min_samples: Annotated[int, Interval(1)] = 4,
        agreement: Annotated[float, Interval(0, 1)] = 0.5,
        k1: Annotated[int, Interval(1)] = 30,
        k2: Annotated[int, Interval(1)] = 6,
    ) -> None:
        least, most = (EPS_GRID[0], EPS_GRID[-1]) if eps == "auto" else (eps, eps)
        if not 0 < least - delta <= most + delta < 1:
            raise ValueError(
                f"eps - delta and eps + delta must lie between 0 and 1, got eps {eps} and "
                f"delta {delta}: reduce delta"
            )
        if agreement == 1:
            raise ValueError(
                "agreement must be below 1, since only images above it are connected, got "
                "1: a value just below 1 requires all clusterings"
            )
        self.eps = eps
        self._max_distance = most + max(delta, _GRAPH_MARGIN)
        self.delta = delta
        self.min_samples = min_samples
        self.agreement = agreement
        self.k1 = k1
        self.k2 = k2

    def cluster(self, features: Tensor) -> PseudoLabels:
        """Compute the distances, choose eps if it is "auto", cluster thrice and combine.

        Args:
            features: Unit vectors ``(M, C)``.

        Returns:
            The labels, the graph, the three clusterings in ``labelings``, and ``eps`` and
            ``agreement`` in ``measured``.
        """
        distance: Any = distances_with_copies(
            features,
            k1=self.k1,
            k2=self.k2,
            max_distance=self._max_distance if self._max_distance < 1 else None,
        )
        labels_at = partial(dbscan_labels, distance, min_samples=self.min_samples)
        eps = self.eps
        if eps == "auto":
            eps = choose_eps(distance, labels_at, self.min_samples)
        labelings = np.stack(
            [labels_at(e) for e in (eps - self.delta, eps, eps + self.delta)]
        )
        labels = agreement_labels(labelings, self.agreement)
        inside = labels != OUTLIER
        fractions = cluster_agreement(labelings, labels)[inside]
        agreement = float(fractions.mean()) if len(fractions) else 0.0
        return PseudoLabels.numbered(
            labels,
            distance=distance,
            measured={"eps": eps, "agreement": agreement},
            labelings=torch.from_numpy(labelings),
        )
