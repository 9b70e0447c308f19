"""Jaccard distance on the CPU, by compiled loops over the rows of sparse matrices."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from selcon_plugin.clustering.compiled import jaccard_kernels as kernels
from selcon_plugin.clustering.compiled.rows import Array, RowThreads

ROUNDING = 1e-5  # generous bound on the rounding error of a sum of a row's weights


class _Rows(NamedTuple):
    """Sparse matrix in CSR form.

    Attributes:
        offsets: Start of each row's entries, int64 ``(M + 1,)``.
        columns: Columns of the entries, int32.
        weights: Weights of the entries, float32.
    """

    offsets: Array
    columns: Array
    weights: Array

    @classmethod
    def of_sizes(cls, sizes: Array) -> _Rows:
        """Allocate rows of the given sizes."""
        offsets = np.concatenate([np.zeros(1, np.int64), sizes.cumsum()])
        total = int(offsets[-1])
        return cls(offsets, np.empty(total, np.int32), np.empty(total, np.float32))

    def transposed(self) -> _Rows:
        """Return the transposed matrix, with ascending columns in each row."""
        result = _Rows(*(np.empty_like(part) for part in self))
        kernels.transpose(*self, *result)
        return result


def jaccard_rows(
    features: Array,
    similarity: Array,
    index: Array,
    *,
    half: int,
    k2: int,
    max_distance: float,
) -> tuple[Array, Array, Array]:
    """Compute the sparse Jaccard distances from the nearest neighbors.

    Args:
        features: Unit vectors, float32 ``(M, C)``.
        similarity: Inner products with the neighbors, float32 ``(M, k1)``.
        index: Neighbors by rank, the image itself first, int32 ``(M, k1)``.
        half: Ranks of the half lists, at most k1.
        k2: Ranks of the query expansion, at most k1.
        max_distance: Largest distance to store; distances of 1 are never stored.

    Returns:
        ``indptr``, ``indices`` and ``data`` of the matrix in CSR form.
    """
    with RowThreads() as threads:
        weights = _membership(threads, features, similarity, index, half)
        if k2 > 1:
            weights = _expand_queries(threads, index, k2, weights)
        upper = _join(threads, weights, max_distance)
    del weights
    num_images = len(index)
    total = num_images + 2 * len(upper.columns)
    index_type = np.int32 if total < 2**31 else np.int64
    indptr = np.empty(num_images + 1, index_type)
    indices, data = np.empty(total, index_type), np.empty(total, np.float32)
    kernels.mirror(*upper, indptr, indices, data)
    return indptr, indices, data


def _membership(
    threads: RowThreads, features: Array, similarity: Array, index: Array, half: int
) -> _Rows:
    """Compute the weights of the members of each image's expanded reciprocal list."""
    num_images, k1 = index.shape
    lists = (*_reciprocal(threads, index, k1), *_reciprocal(threads, index, half))
    counts = np.empty(num_images, np.int64)
    threads.run(partial(kernels.count_expanded, *lists, counts), num_images)
    rows = _Rows.of_sizes(counts)
    work = partial(kernels.membership_weights, features, similarity, index, *lists, *rows)
    threads.run(work, num_images)
    return rows


def _reciprocal(threads: RowThreads, index: Array, width: int) -> tuple[Array, Array]:
    """Return the lists and sizes of each image's mutual neighbors up to a rank."""
    lists = np.empty((len(index), width), np.int32)
    sizes = np.empty(len(index), np.int32)
    threads.run(partial(kernels.reciprocal_lists, index, width, lists, sizes), len(index))
    return lists, sizes


def _expand_queries(threads: RowThreads, index: Array, k2: int, rows: _Rows) -> _Rows:
    """Average the rows of each image's first k2 neighbors."""
    counts = np.empty(len(index), np.int64)
    work = partial(kernels.count_averaged, index, k2, rows.offsets, rows.columns, counts)
    threads.run(work, len(index))
    averaged = _Rows.of_sizes(counts)
    threads.run(partial(kernels.average_neighbors, index, k2, *rows, *averaged), len(index))
    return averaged


def _join(threads: RowThreads, rows: _Rows, max_distance: float) -> _Rows:
    """Find the pairs within the distance, as entries above the diagonal."""
    num_images = len(rows.offsets) - 1
    # The numbering of columns is arbitrary. With columns numbered by increasing length, and
    # each row sorted accordingly, the long columns come last, where no new pair can start.
    length = np.bincount(rows.columns, minlength=num_images)
    rank = np.empty(num_images, np.int32)
    rank[np.argsort(length, kind="stable")] = np.arange(num_images, dtype=np.int32)
    by_column = rows._replace(columns=rank[rows.columns]).transposed()
    by_row = by_column.transposed()
    least = 2 * (1 - max_distance) / (2 - max_distance) - ROUNDING
    work = partial(kernels.join_rows, *by_row, *by_column, max_distance, least)
    parts = threads.run(work, num_images)
    counts, columns, distance = (np.concatenate(part) for part in zip(*parts, strict=True))
    offsets = np.concatenate([np.zeros(1, np.int64), counts.cumsum()])
    return _Rows(offsets, columns, distance)
