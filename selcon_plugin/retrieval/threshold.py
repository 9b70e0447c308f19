"""From which cosine on are two images one person? A suggestion without labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Ashman's D: above 2 a mixture of two equal Gaussians has two peaks.
CLEAR_SEPARATION = 2.0

_SHORTEST_LIST = 8
LONGEST_LIST = 1024
_MIN_RATIO = 0.02  # of the cosines, in the smaller group
_ITERATIONS = 100
_BINS = 512
_MIN_SPREAD = 1e-3


@dataclass(frozen=True)
class ThresholdSuggestion:
    """A cosine that separates the same person from others.

    Attributes:
        threshold: The cosine.
        separation: Ashman's D of the two groups of cosines: distance of their means in
            units of their spread.
        num_neighbors: Length of the lists of neighbors that it was found in.
    """

    threshold: float
    separation: float
    num_neighbors: int

    @property
    def is_clear(self) -> bool:
        """Whether there are two groups at all; else the threshold is a guess."""
        return self.separation >= CLEAR_SEPARATION

    def __str__(self) -> str:
        said = "clear" if self.is_clear else "unclear: check it by eye"
        return (
            f"{self.threshold:.3f} (two groups among the {self.num_neighbors} nearest "
            f"neighbors, separation {self.separation:.1f}, {said})"
        )


def suggest_threshold(neighbor_cosines: ArrayLike) -> ThresholdSuggestion:
    """Find the valley between matches and others in the cosines of nearest neighbors.

    The k nearest neighbors of an image are first the other images of the person, then the
    most similar other people: what a search has to tell apart. To the histogram of the
    cosines of all lists two Gaussians are fitted (EM, begun at Otsu's cut); the suggestion
    is where both are equally likely. k is the first of 8, 16, 32, ... at which the groups
    are clearly apart (Ashman's D of 2), since lists shorter than a person has images hold
    no others; if none is, the k at which they are farthest apart.

    Args:
        neighbor_cosines: Cosines of sampled images with their nearest neighbors, without
            themselves, falling along each row, shape ``(N, K)``. K limits the images of one
            person that this can see.

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
            "a threshold needs the cosines of 2 images or more with 2 neighbors or more, "
            f"(N, K), got shape {cosines.shape}"
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
    """Fit two Gaussians to the histogram; return where they cross and how far they are."""
    counts, edges = np.histogram(cosines, _BINS)
    values = (edges[1:] + edges[:-1]) / 2
    cut = _otsu(counts, values)
    high = np.arange(_BINS) > cut
    if cosines.min() == cosines.max():
        return float(cosines[0]), 0.0
    weight = np.stack([~high, high], axis=1) * counts[:, None] / counts.sum()
    for _ in range(_ITERATIONS):
        share = np.maximum(weight.sum(axis=0), 1e-12)
        mean = (weight * values[:, None]).sum(axis=0) / share
        variance = (weight * (values[:, None] - mean) ** 2).sum(axis=0) / share
        spread = np.maximum(np.sqrt(variance), _MIN_SPREAD)
        lead = _lead_of_higher(values, mean, spread, share)
        higher = 1.0 / (1.0 + np.exp(np.clip(-lead, -500.0, 500.0)))
        weight = np.stack([1.0 - higher, higher], axis=1) * counts[:, None] / counts.sum()
    separation = (mean[1] - mean[0]) / np.sqrt((spread**2).mean())
    if share.min() < _MIN_RATIO:
        separation = 0.0  # the second group is a few outliers
    between = np.linspace(mean[0], mean[1], 1001)
    behind = np.flatnonzero(_lead_of_higher(between, mean, spread, share) < 0.0)
    crossing = between[behind[-1]] if len(behind) else between[0]
    return float(crossing), float(max(separation, 0.0))


def _lead_of_higher(
    values: NDArray[np.float64],
    mean: NDArray[np.float64],
    spread: NDArray[np.float64],
    share: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return by how much the second Gaussian's log-density exceeds the first's."""
    density = np.log(share / spread) - 0.5 * ((values[:, None] - mean) / spread) ** 2
    lead: NDArray[np.float64] = density[:, 1] - density[:, 0]
    return lead


def _otsu(counts: NDArray[np.int64], values: NDArray[np.float64]) -> int:
    """Return the last bin below the cut with most variance between its sides (Otsu)."""
    below = counts.cumsum()[:-1]
    above = counts.sum() - below
    sums = (counts * values).cumsum()[:-1]
    rest = (counts * values).sum() - sums
    apart = sums / np.maximum(below, 1) - rest / np.maximum(above, 1)
    return int((below * above * apart**2).argmax())
