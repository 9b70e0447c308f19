"""Unsupervised choice of the similarity threshold between persons."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Ashman's D: above 2 a mixture of two equal Gaussians has two peaks.
CLEAR_SEPARATION = 2.0
# If every image shows another person, the statistic of the dip test is below 0.5, and from
# 12 images on Ashman's D is below 6 (1,000 simulated sets of images, of 8 to 512 values).
_CLEAR_DIP, _WIDE_SEPARATION = 0.5, 6.0
# Three cosines always fall into two groups; fewer images than these prove nothing.
_FEWEST_IMAGES, _FEWEST_FOR_WIDE = 8, 12

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
        num_images: Number of images whose neighbor lists were used.
        dip: Statistic of Hartigan's dip test of the cosines: the distance of their
            distribution from one with a single peak, times the square root of the number
            of pairs.
        num_mates: Estimated number of images of the same person that a search can find for
            an image; the threshold was computed from it, and is a guess. None if it was
            computed from two groups of cosines.
    """

    threshold: float
    separation: float
    num_neighbors: int
    num_images: int
    dip: float
    num_mates: float | None = None

    @property
    def is_clear(self) -> bool:
        """True if the cosines prove two groups; otherwise the threshold is a guess."""
        if self.separation < CLEAR_SEPARATION or self.num_images < _FEWEST_IMAGES:
            return False
        if self.num_mates is not None:
            return False
        is_wide = self.separation >= _WIDE_SEPARATION
        return self.dip >= _CLEAR_DIP or (is_wide and self.num_images >= _FEWEST_FOR_WIDE)

    def __str__(self) -> str:
        if self.is_clear:
            return (
                f"{self.threshold:.3f} (two groups among the {self.num_neighbors} nearest "
                f"neighbors, separation {self.separation:.1f}, clear)"
            )
        reason = "the cosines do not fall into two groups"
        if self.num_images < _FEWEST_IMAGES:
            reason = f"{self.num_images} images are too few to tell"
        if self.num_mates is not None:
            reason += (
                f"; by estimate {self.num_mates:.1f} images show the person of a query"
            )
        return f"{self.threshold:.3f} (unclear: {reason}; it is a guess, check it by eye)"


def suggest_threshold(neighbor_cosines: ArrayLike) -> ThresholdSuggestion:
    """Find the valley between matches and non-matches in the cosines of nearest neighbors.

    The k nearest neighbors of an image are first the other images of the person, then the
    most similar other persons, which a search must discriminate. A mixture of two Gaussians
    is fitted to the histogram of the cosines of all lists (EM, initialized by Otsu's
    threshold); the suggestion is the cosine at which both are equally likely. k is the
    one of 8, 16, 32, ... at which two groups are most certain: Ashman's D is 2 or more, and
    by Hartigan's dip test the cosines are farthest from having a single peak, or D is 6 or
    more. Lists that are shorter than a person's number of images contain no other persons.
    If there is no such k, the one with the largest separation is used, and the threshold is
    unclear.

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
    best: ThresholdSuggestion | None = None
    length = _SHORTEST_LIST
    while True:
        length = min(length, cosines.shape[1])
        part = cosines[:, :length].ravel()
        # Two images that are neighbors of each other are one pair.
        dip = _dip(part) * (len(part) / 2.0) ** 0.5
        found = ThresholdSuggestion(*_valley(part), length, len(cosines), dip)
        if best is None or _evidence(found) > _evidence(best):
            best = found
        if length in (cosines.shape[1], LONGEST_LIST):
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


def _evidence(found: ThresholdSuggestion) -> tuple[bool, float]:
    """Return a key by which the list length with the most certain groups is the largest."""
    return found.is_clear, found.dip if found.is_clear else found.separation


def _dip(values: NDArray[np.float64]) -> float:
    """Return Hartigan's dip: the distance to the nearest distribution with one peak."""
    counts, _ = np.histogram(values, _BINS)
    ratio = np.append(0.0, counts.cumsum() / counts.sum())
    place = np.arange(len(ratio), dtype=np.float64)
    least, low, high = 1.0, 0, _BINS
    # Left of the peak the nearest distribution is convex, right of it concave. A peak
    # further to the right is worse on the left side, and better on the right one.
    while low <= high:
        peak = (low + high) // 2
        left = _above_convex(place[: peak + 1], ratio[: peak + 1])
        right = _above_convex(-place[peak:][::-1], 1.0 - ratio[peak:][::-1])
        least = min(least, max(left, right))
        low, high = (peak + 1, high) if left < right else (low, peak - 1)
    return least / 2.0


def _above_convex(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Return the largest distance of a curve from the greatest convex one below it."""
    hull: list[int] = []
    for point in range(len(x)):
        while len(hull) > 1 and _is_above(x, y, hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return float((y - np.interp(x, x[hull], y[hull])).max())


def _is_above(
    x: NDArray[np.float64], y: NDArray[np.float64], first: int, middle: int, last: int
) -> bool:
    rise = (y[middle] - y[first]) * (x[last] - x[first])
    return bool(rise >= (y[last] - y[first]) * (x[middle] - x[first]))


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
