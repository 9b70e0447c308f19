"""Threshold from an estimated number of matches, where cosines show no two groups."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Chosen on folders drawn from the training identities of Market-1501, for two networks:
# matches lie 2.6 (spread 1.2) spreads of the upper half above the median, and similar
# other persons make up 2.75 % of the cosines there.
_DISTANCE, _SPREAD, _SIMILAR_OTHERS = 2.6, 1.2, 0.0275
# The smallest estimate, as a fraction of the images, and the most that it may amount to.
_LEAST_RATIO, _MOST_OF_LEAST = 0.005, 40.0
_FEWEST_MATES = 0.3
_UPPER_SPREADS = np.linspace(0.9, 1.5, 13)
_EDGES = np.linspace(-6.0, 10.0, 1601)
_ITERATIONS = 60
_LOWER = 0.1587  # one standard deviation below the median of a Gaussian


def num_mates(cosines: NDArray[np.float32], num_images: float) -> float:
    """Estimate how many images show the person of an image.

    Cosines z = (s - median) / (median - 16 % quantile) of each image are a mixture
    (1 - w) N(0, 1 | b) + w N(2.6 b, 1.2 b), where b is the spread of the upper half; w and
    b are fitted by likelihood; the result is M · max(w - 0.0275, min(0.005, 40 / M)).

    Args:
        cosines: Cosines of N images with K others, -inf where two are not compared, shape
            ``(N, K)``.
        num_images: Mean number M of images that an image is compared with in a search.

    Returns:
        The number, at least 0.3.
    """
    histogram = np.zeros(len(_EDGES) - 1)
    for row in cosines:
        values = row[np.isfinite(row)]
        if len(values) < 8:
            continue
        middle, low = np.quantile(values, [0.5, _LOWER])
        z = (values - middle) / max(middle - low, 1e-6)
        histogram += np.histogram(np.clip(z, -5.9, 9.9), _EDGES)[0]
    ratio = max(_weight(histogram) - _SIMILAR_OTHERS, 0.0) if histogram.any() else 0.0
    least = min(_LEAST_RATIO * num_images, _MOST_OF_LEAST)
    return float(max(ratio * num_images, least, _FEWEST_MATES))


def threshold_of_count(
    cosines: NDArray[np.float32], num_images: float, mates: float
) -> float:
    """Return the cosine that as many pairs reach as there are matches by estimate.

    At the threshold of the best F1, about as many pairs are found as there are matches.

    Args:
        cosines: As for :func:`num_mates`.
        num_images: As for :func:`num_mates`.
        mates: Result of :func:`num_mates`.
    """
    values = cosines[np.isfinite(cosines)]
    count = round(len(values) * mates / num_images)
    place = int(np.clip(len(values) - count, 0, len(values) - 1))
    return float(np.partition(values, place)[place])


def _weight(histogram: NDArray[np.float64]) -> float:
    """Fit the weight of the matches by EM, for the most likely spread."""
    ratio = histogram / histogram.sum()
    z = (_EDGES[1:] + _EDGES[:-1]) / 2
    best = -np.inf, 0.0
    for spread in _UPPER_SPREADS:
        others = _bell(z / np.where(z < 0.0, 1.0, spread))
        matches = _bell((z / spread - _DISTANCE) / _SPREAD)
        weight = 0.01
        for _ in range(_ITERATIONS):
            both = weight * matches + (1.0 - weight) * others + 1e-300
            weight = float((ratio * weight * matches / both).sum())
        mixture = weight * matches + (1.0 - weight) * others
        likelihood = float((ratio * np.log(mixture + 1e-12)).sum())
        best = max(best, (likelihood, weight))
    return best[1]


def _bell(z: NDArray[np.float64]) -> NDArray[np.float64]:
    density = np.exp(-0.5 * z**2)
    result: NDArray[np.float64] = density / density.sum()
    return result
