"""One figure for how well features tell people apart, without a single identity.

For choosing between two networks on the same images, or two epochs of one run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from selcon_plugin.clustering import dbscan_labels, jaccard_distance
from selcon_plugin.clustering.auto_eps import EPS_GRID, best_trial, try_eps
from selcon_plugin.clustering.jaccard import unit_features
from selcon_plugin.clustering.neighborhood import NeighborhoodSizes
from selcon_plugin.metrics.collapse import find_collapse_signs, measure_spread

__all__ = ["LabelFreeQuality", "label_free_quality"]

# Distances that silhouette and coverage see, as when DBSCAN's eps is "auto".
_REACH = EPS_GRID[-1] + 0.1


@dataclass(frozen=True)
class LabelFreeQuality:
    """How well the images fall into clusters.

    Attributes:
        value: ``silhouette * sqrt(coverage) * stability``, in 0..1, at the eps that makes
            it largest; see :class:`~selcon_plugin.clustering.auto_eps.EpsTrial`.
        silhouette: Mean silhouette, outliers counted 0.
        coverage: Share of the images' closeness that lies inside clusters.
        stability: Agreement with the clusters at the next smaller and larger eps.
        eps: That eps of DBSCAN; 0 where no eps makes two clusters.
        num_clusters: Its clusters.
        outlier_ratio: Share of the images in none.
        collapse: In words, what speaks for collapsed features, whose clusters mean nothing:
            ``value`` is then 0; see :mod:`selcon_plugin.metrics.collapse`.
    """

    value: float
    silhouette: float
    coverage: float
    stability: float
    eps: float
    num_clusters: int
    outlier_ratio: float
    collapse: str = ""


def label_free_quality(
    features: Tensor | NDArray[np.floating[Any]], *, sizes: NeighborhoodSizes | None = None
) -> LabelFreeQuality:
    """Measure how well features fall into clusters: the larger, the better.

    It is what ``eps: auto`` maximizes: DBSCAN on the k-reciprocal Jaccard distance, at the
    best eps of a grid. That distance depends on who is near whom, hardly on how near, so
    that networks with other scales and lengths of features compare. Compare only networks
    on the same images with the same sizes: the figure depends on both.

    Args:
        features: Of images 0..M-1, shape ``(M, C)``, on any device; scaled to unit length.
        sizes: Neighbors looked at; by default those for M images.

    Returns:
        The figure and what it is made of; 0 where no eps makes two clusters, and where the
        features have collapsed.

    Raises:
        ValueError: If the features are no matrix or not finite.
    """  # noqa: DOC502  (raised by what this calls)
    features = unit_features(features)
    collapse = ""
    if len(features) > 1:
        collapse = str(find_collapse_signs(measure_spread(features), len(features)))
    sizes = sizes or NeighborhoodSizes.for_images(len(features))
    distance = jaccard_distance(features, k1=sizes.k1, k2=sizes.k2, max_distance=_REACH)
    labels_at = partial(dbscan_labels, distance, min_samples=sizes.min_samples)
    best = best_trial(try_eps(distance, labels_at, sizes.min_samples))
    if best is None:
        return LabelFreeQuality(0.0, 0.0, 0.0, 0.0, 0.0, 0, 1.0, collapse)
    return LabelFreeQuality(
        0.0 if collapse else best.score,
        best.silhouette,
        best.coverage,
        best.stability,
        best.eps,
        int(best.labels.max()) + 1,
        float(np.mean(best.labels < 0)),
        collapse,
    )
