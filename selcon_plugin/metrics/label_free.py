"""Label-free criterion of how well features discriminate persons.

It serves model selection between networks on the same images, or epochs of one run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from selcon_plugin.clustering import dbscan_labels
from selcon_plugin.clustering.auto_eps import EPS_GRID, best_trial, try_eps
from selcon_plugin.clustering.auto_threshold import estimate_images_per_person
from selcon_plugin.clustering.copies import distances_with_copies
from selcon_plugin.clustering.jaccard import unit_features
from selcon_plugin.clustering.neighborhood import NeighborhoodSizes
from selcon_plugin.metrics.collapse import find_collapse_signs, measure_spread

__all__ = ["LabelFreeQuality", "label_free_quality"]

# Largest distance in silhouette and coverage, the same as for DBSCAN's eps "auto".
_MAX_DISTANCE = EPS_GRID[-1] + 0.1


@dataclass(frozen=True)
class LabelFreeQuality:
    """Label-free quality of features, measured by clustering them.

    Attributes:
        value: ``silhouette * sqrt(coverage) * stability``, in 0..1, at the eps that
            maximizes it; see :class:`~selcon_plugin.clustering.auto_eps.EpsTrial`.
        silhouette: Mean silhouette, in which outliers count as 0.
        coverage: Fraction of the closeness between images that lies inside clusters.
        stability: Agreement with the clusterings at the next smaller and larger eps.
        eps: Selected eps of DBSCAN; 0 if no eps gives two clusters.
        num_clusters: Number of clusters at that eps.
        outlier_ratio: Fraction of outliers at that eps.
        collapse: Description of signs of collapsed features, whose clusters are
            meaningless: ``value`` is then 0; see :mod:`selcon_plugin.metrics.collapse`.
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
    """Measure how well features form clusters; larger is better.

    The criterion is the one that ``eps: auto`` maximizes: the quality of DBSCAN on the
    k-reciprocal Jaccard distance, at the best eps of a grid. That distance depends on the
    order of neighbors and hardly on their distances, so networks with different scales and
    dimensions of features are comparable. Only results for the same images and the same
    sizes are comparable, since the criterion depends on both.

    Args:
        features: Features of images 0..M-1, shape ``(M, C)``, on any device; L2-normalized
            here.
        sizes: Neighborhood sizes; by default those for the estimated number of images per
            person.

    Returns:
        The criterion and its factors; it is 0 if no eps gives two clusters, or if the
        features have collapsed.

    Raises:
        ValueError: If the features are not a finite matrix.
    """  # noqa: DOC502  (raised by a function called here)
    features = unit_features(features)
    collapse = ""
    if len(features) > 1:
        collapse = str(find_collapse_signs(measure_spread(features), len(features)))
    if sizes is None:
        sizes = NeighborhoodSizes.for_people(estimate_images_per_person(features))
    distance = distances_with_copies(
        features, k1=sizes.k1, k2=sizes.k2, max_distance=_MAX_DISTANCE
    )
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
