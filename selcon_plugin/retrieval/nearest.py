"""Nearest rows of an index, exactly or with candidates of an approximate search."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selcon_plugin.retrieval.approximate import NUM_EFFORTS, Approximate
from selcon_plugin.retrieval.exact import search_exactly
from selcon_plugin.retrieval.rows import Snapshot

# Below this recall an approximate search is not used.
MIN_RECALL = 0.95
# The effort of a search is raised until it has this recall.
_AIM = 0.98
_TOP = 10  # neighbors per query by which recall is measured
_QUERIES = 64
_FILTERS = 4  # cameras by which the recall with a filter is measured
_TOLERANCE = 1e-6  # of equal cosines

# Candidates of the approximate search that are ranked exactly, per result.
_CANDIDATES_PER_RESULT = 4
_MIN_CANDIDATES = 64
# Up to this number of rows that a filter leaves, or this fraction, the search is exact.
_FEW_ROWS, _FEW_RATIO = 20_000, 0.1

_Found = tuple[NDArray[np.float32], NDArray[np.int64]]


@dataclass(frozen=True)
class Recall:
    """Measured recall of an approximate search, of the ten nearest images.

    Attributes:
        plain: Fraction of the exact ten nearest that it finds among all images.
        filtered: The same among the images of other cameras than that of the query, or
            among half of the images if there are fewer than two cameras.
        num_queries: Number of queries, which are sampled from the index.
        num_images: Number of images of the index when it was measured.
    """

    plain: float
    filtered: float
    num_queries: int
    num_images: int

    @property
    def is_enough(self) -> bool:
        """True if both values reach 0.95; otherwise the index is searched exactly."""
        return min(self.plain, self.filtered) >= MIN_RECALL

    def __str__(self) -> str:
        return (
            f"recall@{_TOP} {self.plain:.3f}, with a filter {self.filtered:.3f}, measured "
            f"on {self.num_queries} queries"
        )


def find_nearest(
    state: Snapshot,
    search: Approximate | None,
    queries: NDArray[np.float32],
    allowed: NDArray[np.bool_],
    count: int,
) -> _Found:
    """Find the nearest allowed rows; among equal ones the first wins.

    Args:
        state: The index.
        search: Its approximate search; None for an exact one.
        queries: Unit vectors ``(Q, D)``.
        allowed: Mask of the rows that may be found, shape ``(N,)``.
        count: Number of rows per query.

    Returns:
        Similarities and rows ``(Q, count)``, filled with -inf and -1 where there are fewer.
    """
    features, rows = state.features, np.flatnonzero(allowed)
    is_filtered = len(rows) < len(allowed)
    few = is_filtered and len(rows) <= max(_FEW_ROWS, _FEW_RATIO * len(allowed))
    if search is None or few:
        return search_exactly(queries, features, rows, count)
    # Rows that the approximate search does not know yet are compared exactly.
    tail = rows[rows >= search.num_rows]
    similarity, found = search_exactly(queries, features, tail, count)
    wanted = max(_MIN_CANDIDATES, _CANDIDATES_PER_RESULT * count)
    candidates = search.candidates(queries, wanted, allowed[: search.num_rows])
    unsure = [number for number, near in enumerate(candidates) if near is None]
    if unsure:
        best = search_exactly(queries[unsure], features, rows, count)
        similarity[unsure], found[unsure] = best
    for number, near in enumerate(candidates):
        if near is None:
            continue
        best = search_exactly(queries[number : number + 1], features, np.sort(near), count)
        both = np.concatenate([similarity[number], best[0][0]])
        both_rows = np.concatenate([found[number], best[1][0]])
        order = np.lexsort((both_rows, -both))[:count]
        similarity[number], found[number] = both[order], both_rows[order]
    return similarity, found


def calibrate(search: Approximate, state: Snapshot) -> Recall:
    """Measure the recall of a search on its own index; raise its effort where needed.

    Args:
        search: Approximate search; its effort is set.
        state: The index.

    Returns:
        The recall at that effort.
    """
    plain = _Sample(state, _all_rows)
    filtered = _Sample(state, _other_cameras)
    for effort in range(NUM_EFFORTS):
        search.effort = effort
        recall = Recall(
            plain.recall(search),
            filtered.recall(search),
            plain.num_queries,
            state.num_live,
        )
        if min(recall.plain, recall.filtered) >= _AIM:
            break
    return recall


_Groups = Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]


class _Sample:
    """Queries of an index, with the similarities of their exact nearest rows."""

    def __init__(
        self,
        state: Snapshot,
        groups: Callable[[Snapshot, NDArray[np.int64]], _Groups],
    ) -> None:
        self._state = state
        live = np.flatnonzero(state.live)
        count = min(_QUERIES, len(live))
        rows = live[np.arange(count) * len(live) // count]
        queries = state.features[rows].astype(np.float32)
        # Half of the queries are no images of the index, but somewhat similar ones.
        noise = np.random.default_rng(0).standard_normal(queries.shape, dtype=np.float32)
        noise *= 0.7 / np.linalg.norm(noise, axis=1, keepdims=True)
        queries[1::2] += noise[1::2]
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
        self._groups = []
        for chosen, allowed in groups(state, rows):
            allowed_rows = np.flatnonzero(allowed)
            best, _ = search_exactly(
                queries[chosen], state.features, allowed_rows, _TOP + 1
            )
            self._groups.append((queries[chosen], allowed, best))
        self.num_queries = count

    def recall(self, search: Approximate) -> float:
        """Return the fraction of the exact nearest rows that a search finds."""
        hits = total = 0
        for queries, allowed, best in self._groups:
            count = best.shape[1]
            got, _ = find_nearest(self._state, search, queries, allowed, count)
            worst = np.where(np.isfinite(best), best, np.inf).min(axis=1, keepdims=True)
            total += int(np.isfinite(best).sum())
            hits += int(np.minimum((got >= worst - _TOLERANCE).sum(axis=1), count).sum())
        return hits / total if total else 1.0


def _all_rows(state: Snapshot, rows: NDArray[np.int64]) -> _Groups:
    yield np.arange(len(rows)), state.live


def _other_cameras(state: Snapshot, rows: NDArray[np.int64]) -> _Groups:
    """Yield queries with the rows of other cameras, or with a random half of the rows."""
    if len(state.camera_names) < 2:
        half = np.random.default_rng(1).random(len(state.live)) < 0.5
        yield np.arange(len(rows)), state.live & half
        return
    cameras = state.cameras
    most = Counter(cameras[rows].tolist()).most_common(_FILTERS)
    for camera, _ in most:
        yield np.flatnonzero(cameras[rows] == camera), state.live & (cameras != camera)
