"""Unsupervised choice of the similarity threshold between persons."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Ashman's D: above 2 a mixture of two equal Gaussians has two peaks.
CLEAR_SEPARATION = 2.0

_SHORTEST_LIST = 8
LONGEST_LIST = 1024
_MIN_RATIO = 0.02  # smallest fraction of the cosines in a group
_ITERATIONS = 100
_BINS = 512
_MIN_SPREAD = 1e-3


@dataclass(frozen=True)
class ThresholdSuggestion:
    """Suggested cosine threshold between the same person and other persons.

    Attributes:
        threshold: Cosine at the threshold.
        separation: Ashman's D of the two groups of cosines: distance of their means in
            units of their standard deviation.
        num_neighbors: Length of the neighbor lists that the threshold was computed from.
    """

    threshold: float
    separation: float
    num_neighbors: int

    @property
    def is_clear(self) -> bool:
        """True if there are two separate groups; otherwise the threshold is a guess."""
        return self.separation >= CLEAR_SEPARATION

    def __str__(self) -> str:
        verdict = "clear" if self.is_clear else "unclear: check it by eye"
        return (
            f"{self.threshold:.3f} (two groups among the {self.num_neighbors} nearest "
            f"neighbors, separation {self.separation:.1f}, {verdict})"
        )


def suggest_threshold(neighbor_cosines: ArrayLike) -> ThresholdSuggestion:
    """Find the valley between matches and non-matches in the cosines of nearest neighbors.

    The k nearest neighbors of an image are first the other images of the person, then the
    most similar other persons, which a search must discriminate. A mixture of two Gaussians
    is fitted to the histogram of the cosines of all lists (EM, initialized by Otsu's
    threshold); the suggestion is the cosine at which both are equally likely. k is the
    first of 8, 16, 32, ... at which the groups are clearly separated (Ashman's D of 2),
    because lists that are shorter than a person's number of images contain no other
    persons; if there is no such k, the one with the largest separation is used.

    Args:
        neighbor_cosines: Cosines of sampled images with their nearest neighbors, excluding
            themselves, in descending order in each row, shape ``(N, K)``. K bounds the
            number of images per person that can be detected.

    Returns:
        The suggestion.

    Raises:
        ValueError: If there are fewer than 2 rows or 2 columns, or values are not finite.

    Example:
        >>> two_mates_then_others = [[0.91, 0.88, 0.32, 0.30], [0.93, 0.87, 0.28, 0.25]] * 4
        >>> suggestion = suggest_threshold(two_mates_then_others)
        >>> 0.35 < suggestion.threshold < 0.85, suggestion.is_clear
        (True, True)
    """
    cosines = np.asarray(neighbor_cosines, dtype=np.float64)
    if cosines.ndim != 2 or min(cosines.shape) < 2:
        raise ValueError(
            "a threshold needs the cosines of at least 2 images with at least 2 neighbors, "
            f"shape (N, K), got shape {cosines.shape}"
        )
    if not np.isfinite(cosines).all():
        raise ValueError("the cosines are not finite")
    best = None
    length = _SHORTEST_LIST
    while True:
        length = min(length, cosines.shape[1])
        found = ThresholdSuggestion(*_valley(cosines[:, :length].ravel()), length)
        if best is None or found.separation > best.separation:
            best = found
        if best.is_clear or length in (cosines.shape[1], LONGEST_LIST):
            return best
        length *= 2


def _valley(cosines: NDArray[np.float64]) -> tuple[float, float]:
    """Fit two Gaussians to the histogram; return their crossing and separation."""
    counts, edges = np.histogram(cosines, _BINS)
    values = (edges[1:] + edges[:-1]) / 2
    cut = _otsu(counts, values)
    high = np.arange(_BINS) > cut
    if cosines.min() == cosines.max():
        return float(cosines[0]), 0.0
    weight = np.stack([~high, high], axis=1) * counts[:, None] / counts.sum()
    for _ in range(_ITERATIONS):
        ratio = np.maximum(weight.sum(axis=0), 1e-12)
        mean = (weight * values[:, None]).sum(axis=0) / ratio
        variance = (weight * (values[:, None] - mean) ** 2).sum(axis=0) / ratio
        spread = np.maximum(np.sqrt(variance), _MIN_SPREAD)
        log_odds = _log_odds_of_higher(values, mean, spread, ratio)
        higher = 1.0 / (1.0 + np.exp(np.clip(-log_odds, -500.0, 500.0)))
        weight = np.stack([1.0 - higher, higher], axis=1) * counts[:, None] / counts.sum()
    separation = (mean[1] - mean[0]) / np.sqrt((spread**2).mean())
    if ratio.min() < _MIN_RATIO:
        separation = 0.0  # the second group consists of a few outliers
    between = np.linspace(mean[0], mean[1], 1001)
    behind = np.flatnonzero(_log_odds_of_higher(between, mean, spread, ratio) < 0.0)
    crossing = between[behind[-1]] if len(behind) else between[0]
    return float(crossing), float(max(separation, 0.0))


def _log_odds_of_higher(
    values: NDArray[np.float64],
    mean: NDArray[np.float64],
    spread: NDArray[np.float64],
    ratio: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return the log-density of the second Gaussian minus that of the first."""
    density = np.log(ratio / spread) - 0.5 * ((values[:, None] - mean) / spread) ** 2
    log_odds: NDArray[np.float64] = density[:, 1] - density[:, 0]
    return log_odds


def _otsu(counts: NDArray[np.int64], values: NDArray[np.float64]) -> int:
    """Return the last bin below Otsu's threshold of maximum between-class variance."""
    below = counts.cumsum()[:-1]
    above = counts.sum() - below
    sums = (counts * values).cumsum()[:-1]
    rest = (counts * values).sum() - sums
    apart = sums / np.maximum(below, 1) - rest / np.maximum(above, 1)
    return int((below * above * apart**2).argmax())
