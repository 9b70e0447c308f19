"""DBSCAN's eps, found without labels."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from selcon_plugin.clustering.pseudo_labels import outliers_alone
from selcon_plugin.clustering.quality import adjusted_mutual_info, silhouette_samples

logger = logging.getLogger(__name__)

# The published settings for Jaccard distances lie between 0.4 and 0.7.
EPS_GRID = tuple(round(0.30 + 0.02 * step, 2) for step in range(26))  # 0.30 ... 0.80
_FALLBACK_EPS = 0.6
_LEAST_CORE_RATIO = 0.05


@dataclass(frozen=True, eq=False)
class EpsTrial:
    """A clustering at one eps, and how good it is, told without labels.

    Both trivial ends score 0: everything an outlier, and one giant cluster.

    Attributes:
        eps: DBSCAN's eps.
        labels: Cluster of each image, -1 for an outlier, int64 ``(M,)``.
        silhouette: Mean silhouette, where an outlier counts 0, at least 0: falls when
            clusters merge, when one is torn apart and when images are left out.
        coverage: Share of all closeness 1 - d that lies inside clusters. Without it the
            silhouette alone prefers too small an eps where identities have many images,
            since two of them that share no neighbor are at distance 1.
        stability: The smaller of the adjusted mutual information with the clustering at the
            grid's next smaller and at its next larger eps, each outlier a cluster of its
            own. It falls before clusters collapse into one.
    """

    eps: float
    labels: NDArray[np.int64]
    silhouette: float
    coverage: float
    stability: float

    @property
    def score(self) -> float:
        """Silhouette times root of coverage times stability."""
        return self.silhouette * math.sqrt(self.coverage) * self.stability


def choose_eps(
    distance: scipy.sparse.csr_array,
    labels_at: Callable[[float], NDArray[np.int64]],
    min_samples: int,
) -> float:
    """Choose DBSCAN's eps from the distances alone.

    Each eps of a grid for which at least 5 % of the images are core images (the distances
    to the ``min_samples``-th nearest image tell) is tried, and gets the score of
    :class:`EpsTrial`. Of equally good neighboring eps the middle one is taken.

    On 29 synthetic data sets the adjusted mutual information with the identities was 0.014
    below that of the best eps of the grid on average, 0.007 in the median and 0.11 at worst
    (with eps = 0.6: 0.040, 0.019 and 0.33); the worst were small sets of identities that
    hardly any eps tells apart.

    Args:
        distance: Symmetric, shape ``(M, M)``, reaching beyond the largest eps of
            ``EPS_GRID``; what is not stored is 1.
        labels_at: Labels, int64 ``(M,)``, of DBSCAN with a given eps.
        min_samples: Neighbors, itself included, that make a core image.

    Returns:
        An eps of ``EPS_GRID``; 0.6, and a warning, where none gives two clusters.
    """
    best = best_trial(try_eps(distance, labels_at, min_samples))
    if best is None:
        logger.warning(
            "no eps from %g to %g makes two clusters that hold together: using %g",
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
    """Cluster with each eps of the grid at which there are core images enough.

    Args:
        distance: As for :func:`choose_eps`.
        labels_at: As there.
        min_samples: As there.

    Returns:
        A trial for each, by rising eps.
    """
    core_at = _core_distances(distance, min_samples)
    least = _LEAST_CORE_RATIO * len(core_at)
    grid = [eps for eps in EPS_GRID if np.count_nonzero(core_at <= eps) >= least]
    labelings = [labels_at(eps) for eps in grid]
    stability = _stability([outliers_alone(labels) for labels in labelings])
    return [
        EpsTrial(eps, labels, *_quality(distance, labels), stable)
        for eps, labels, stable in zip(grid, labelings, stability.tolist(), strict=True)
    ]


def best_trial(trials: Sequence[EpsTrial]) -> EpsTrial | None:
    """Return the trial of the highest score; of equal neighbors the middle one.

    Args:
        trials: By rising eps.

    Returns:
        The trial; None where all score 0.
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
    """Distance within which each image has ``min_samples`` images, itself included."""
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
    """Silhouette and coverage; 0 with fewer than two clusters."""
    if labels.max(initial=-1) < 1:
        return 0.0, 0.0
    silhouette = float(np.nansum(silhouette_samples(distance, labels))) / len(labels)
    return max(0.0, silhouette), _coverage(distance, labels)


def _coverage(distance: scipy.sparse.csr_array, labels: NDArray[np.int64]) -> float:
    """Share of the closeness 1 - d between images that lies inside clusters."""
    row = np.repeat(np.arange(len(labels)), np.diff(distance.indptr))
    column = distance.indices
    closeness = np.where(row != column, 1.0 - distance.data, 0.0)
    total = closeness.sum()
    inside = closeness[(labels[row] == labels[column]) & (labels[row] >= 0)].sum()
    return float(inside / total) if total else 0.0


def _stability(labelings: list[NDArray[np.int64]]) -> NDArray[np.float64]:
    """Agreement of each labeling with its neighbors, the smaller one where it has two."""
    agreement = [adjusted_mutual_info(a, b) for a, b in itertools.pairwise(labelings)]
    return np.minimum([*agreement[:1], *agreement], [*agreement, *agreement[-1:]])
