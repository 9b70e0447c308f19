"""Suggestion of a threshold from images sampled over an index."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from selcon_plugin.retrieval.exact import Rows, search_exactly
from selcon_plugin.retrieval.threshold import (
    LONGEST_LIST,
    ThresholdSuggestion,
    suggest_threshold,
)
from selcon_plugin.retrieval.threshold_counts import num_mates, threshold_of_count

_SAMPLED_QUERIES = 256  # images from which a threshold is suggested
_SAMPLED_ROWS = 20_000  # images that they are compared with where matches are counted


def suggest_for_rows(
    features: Rows, rows: NDArray[np.int64], cameras: NDArray[np.object_] | None = None
) -> ThresholdSuggestion:
    """Suggest a threshold for searches in some rows of an index.

    Args:
        features: Unit vectors of the index, shape ``(N, D)``.
        rows: Rows that are compared with each other, ascending, at least 3.
        cameras: Camera of each of the N rows: only rows of different cameras are compared.
            None to compare all.

    Returns:
        Two groups among the nearest neighbors, if they are clear; otherwise the cosine
        that as many pairs reach as there are matches by estimate.
    """
    sample = _spread(rows, _SAMPLED_QUERIES)
    queries = features[sample].astype(np.float32)
    lists = _nearest(features, queries, sample, rows, cameras)
    if min(lists.shape) < 2:  # hardly an image has two others in other cameras
        return suggest_for_rows(features, rows)
    suggestion = suggest_threshold(lists)
    if suggestion.is_clear:
        return suggestion
    others = _spread(rows, _SAMPLED_ROWS)
    cosines = queries @ features[others].astype(np.float32).T
    cosines[_is_left_out(sample, others, cameras)] = -np.inf
    compared = np.isfinite(cosines).sum() / len(sample) * len(rows) / len(others)
    mates = num_mates(cosines, compared)
    threshold = threshold_of_count(cosines, compared, mates)
    return replace(suggestion, threshold=threshold, num_mates=mates)


def _spread(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    count = min(count, len(rows))
    return rows[np.arange(count) * len(rows) // count]


def _is_left_out(
    sample: NDArray[np.int64],
    others: NDArray[np.int64],
    cameras: NDArray[np.object_] | None,
) -> NDArray[np.bool_]:
    """Return which pairs are an image with itself, or of one camera."""
    itself: NDArray[np.bool_] = sample[:, None] == others
    if cameras is None:
        return itself
    itself |= (cameras[sample][:, None] == cameras[others]).astype(bool)
    return itself


def _nearest(
    features: Rows,
    queries: NDArray[np.float32],
    sample: NDArray[np.int64],
    rows: NDArray[np.int64],
    cameras: NDArray[np.object_] | None,
) -> NDArray[np.float32]:
    """Return the cosines of the nearest rows, in lists of one length."""
    if cameras is None:
        count = min(LONGEST_LIST + 1, len(rows))
        similarity, found = search_exactly(queries, features, rows, count)
        itself = found == sample[:, None]
        itself[~itself.any(axis=1), -1] = True  # the image has too many duplicates
        result: NDArray[np.float32] = similarity[~itself].reshape(len(sample), -1)
        return result
    lists = np.full((len(sample), LONGEST_LIST), -np.inf, dtype=np.float32)
    for name in set(cameras[sample]):
        own = np.flatnonzero(cameras[sample] == name)
        lists[own], _ = search_exactly(
            queries[own], features, rows[cameras[rows] != name], LONGEST_LIST
        )
    # Lists that are shorter than three quarters of the others would shorten all.
    lengths = np.isfinite(lists).sum(axis=1)
    length = max(2, int(np.quantile(lengths, 0.25, method="lower")))
    return lists[lengths >= length, :length]
