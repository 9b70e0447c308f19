"""Unsupervised selection of DBSCAN's eps."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from selcon_plugin.clustering.pseudo_labels import outliers_as_singletons
from selcon_plugin.clustering.quality import adjusted_mutual_info, silhouette_samples

logger = logging.getLogger(__name__)

# The published settings for Jaccard distances lie between 0.4 and 0.7.
EPS_GRID = tuple(round(0.30 + 0.02 * step, 2) for step in range(26))  # 0.30 ... 0.80
_FALLBACK_EPS = 0.6
_MIN_CORE_RATIO = 0.05


@dataclass(frozen=True, eq=False)
class EpsTrial:
    """Clustering at one eps, with its unsupervised quality criteria.

    Both trivial clusterings score 0: all images as outliers, and one giant cluster.

    Attributes:
        eps: DBSCAN's eps.
        labels: Cluster of each image, -1 for an outlier, int64 ``(M,)``.
        silhouette: Mean silhouette, clamped to at least 0, in which an outlier counts as 0.
            It falls when clusters merge, when a cluster splits and when images become
            outliers.
        coverage: Fraction of the total closeness 1 - d that lies inside clusters. Without
            it, the silhouette prefers too small an eps where identities have many images,
            since two of them that share no neighbor are at distance 1.
        stability: The smaller of the adjusted mutual information with the clusterings at
            the next smaller and the next larger eps of the grid, with each outlier as a
            singleton cluster; 1 for the only eps. It falls before clusters collapse into
            one.
    """

    eps: float
    labels: NDArray[np.int64]
    silhouette: float
    coverage: float
    stability: float

    @property
    def score(self) -> float:
        """Product of silhouette, square root of coverage, and stability."""
        return self.silhouette * math.sqrt(self.coverage) * self.stability


def choose_eps(
    distance: scipy.sparse.csr_array,
    labels_at: Callable[[float], NDArray[np.int64]],
    min_samples: int,
) -> float:
    """Choose DBSCAN's eps from the distances, without labels.

    Every eps of a grid is tried at which at least 5 % of the images are core images
    (by the distance to the ``min_samples``-th nearest image), and gets the score of
    :class:`EpsTrial`. Among adjacent eps with equal scores the middle one is chosen.

    On 29 synthetic data sets the adjusted mutual information with the identities was below
    that of the best eps of the grid by 0.014 on average, 0.007 in the median and 0.11 at
    worst (with eps = 0.6: 0.040, 0.019 and 0.33); the worst cases were small sets of
    identities that hardly any eps separates.

    Args:
        distance: Symmetric matrix, shape ``(M, M)``, that stores distances beyond the
            largest eps of ``EPS_GRID``; entries that are not stored are 1.
        labels_at: Function from an eps to DBSCAN's labels, int64 ``(M,)``.
        min_samples: Neighbors, including the image itself, that make a core image.

    Returns:
        An eps of ``EPS_GRID``; 0.6, with a warning, if none gives two clusters.
    """
    best = best_trial(try_eps(distance, labels_at, min_samples))
    if best is None:
        logger.warning(
            "no eps from %g to %g gives two compact clusters: falling back to eps %g",
            EPS_GRID[0],
            EPS_GRID[-1],
            _FALLBACK_EPS,
        )
        return _FALLBACK_EPS
    return best.eps


def try_eps(
    distance: scipy.sparse.csr_array,
    labels_at: Callable[[float], NDArray[np.int64]],
    min_samples: int,
) -> list[EpsTrial]:
    """Cluster with each eps of the grid that gives enough core images.

    Args:
        distance: See :func:`choose_eps`.
        labels_at: See :func:`choose_eps`.
        min_samples: See :func:`choose_eps`.

    Returns:
        One trial per eps, by increasing eps.
    """
    core_at = _core_distances(distance, min_samples)
    least = _MIN_CORE_RATIO * len(core_at)
    grid = [eps for eps in EPS_GRID if np.count_nonzero(core_at <= eps) >= least]
    labelings = [labels_at(eps) for eps in grid]
    stability = _stability([outliers_as_singletons(labels) for labels in labelings])
    return [
        EpsTrial(eps, labels, *_quality(distance, labels), stable)
        for eps, labels, stable in zip(grid, labelings, stability.tolist(), strict=True)
    ]


def best_trial(trials: Sequence[EpsTrial]) -> EpsTrial | None:
    """Return the trial with the highest score; the middle one of adjacent ties.

    Args:
        trials: Trials by increasing eps.

    Returns:
        The best trial; None if all scores are 0.
    """
    scores = np.array([trial.score for trial in trials])
    if not scores.size or scores.max() <= 0:
        return None
    best = first = int(scores.argmax())
    while best + 1 < len(scores) and np.isclose(scores[best + 1], scores[first]):
        best += 1
    return trials[(first + best) // 2]


def _core_distances(
    distance: scipy.sparse.csr_array, min_samples: int
) -> NDArray[np.float64]:
    """Return each image's distance to its ``min_samples``-th nearest, itself included."""
    row = np.repeat(np.arange(distance.shape[0]), np.diff(distance.indptr))
    order = np.lexsort((distance.data, row))
    rank = np.arange(len(row)) - distance.indptr[row]  # column 0 is the image itself
    result = np.ones(distance.shape[0])
    at_rank = rank == min_samples - 1
    result[row[at_rank]] = distance.data[order][at_rank]
    return result


def _quality(
    distance: scipy.sparse.csr_array, labels: NDArray[np.int64]
) -> tuple[float, float]:
    """Return silhouette and coverage; both are 0 with fewer than two clusters."""
    if labels.max(initial=-1) < 1:
        return 0.0, 0.0
    silhouette = float(np.nansum(silhouette_samples(distance, labels))) / len(labels)
    return max(0.0, silhouette), _coverage(distance, labels)


def _coverage(distance: scipy.sparse.csr_array, labels: NDArray[np.int64]) -> float:
    """Return the fraction of the closeness 1 - d between images inside clusters."""
    row = np.repeat(np.arange(len(labels)), np.diff(distance.indptr))
    column = distance.indices
    closeness = np.where(row != column, 1.0 - distance.data, 0.0)
    total = closeness.sum()
    inside = closeness[(labels[row] == labels[column]) & (labels[row] >= 0)].sum()
    return float(inside / total) if total else 0.0


def _stability(labelings: list[NDArray[np.int64]]) -> NDArray[np.float64]:
    """Return each labeling's agreement with its neighbors, the smaller one of two.

    A single labeling, of the only eps with enough core images, has nothing to differ from.
    """
    if len(labelings) == 1:
        return np.ones(1)
    agreement = [adjusted_mutual_info(a, b) for a, b in itertools.pairwise(labelings)]
    return np.minimum([*agreement[:1], *agreement], [*agreement, *agreement[-1:]])
