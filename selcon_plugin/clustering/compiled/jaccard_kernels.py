"""Compiled loops of the Jaccard distance.

Sparse matrices are in CSR form: ``offsets (M + 1,)`` holds the start of each row, and
``columns`` and ``weights`` hold its entries. ``start`` and ``stop`` bound the rows that a
call processes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from selcon_plugin.clustering.compiled.rows import Array, dot, kernel


@kernel
def reciprocal_lists(
    index: Array, width: int, lists: Array, sizes: Array, start: int, stop: int
) -> None:
    """Keep those of a row's first ``width`` neighbors that are mutual.

    Args:
        index: Neighbors by rank, with the row itself in column 0, int32 ``(M, >= width)``.
        width: Number of ranks to use.
        lists: Output: the kept neighbors in order of rank, int32 ``(M, width)``.
        sizes: Output: number of kept neighbors, int32 ``(M,)``.
        start: First row.
        stop: One past the last row.
    """
    for i in range(start, stop):
        size = 0
        for a in range(width):
            j = index[i, a]
            for b in range(width):
                if index[j, b] == i:
                    lists[i, size] = j
                    size += 1
                    break
        sizes[i] = size


@kernel
def _expand(
    i: int,
    lists: Array,
    sizes: Array,
    half_lists: Array,
    half_sizes: Array,
    mark: Array,
    members: Array,
) -> Any:
    # mark[j] is 2i + 1 if j is in the list of i, and 2i + 2 if the expansion added it; i
    # only grows, so the marks of earlier rows need not be cleared.
    size = sizes[i]
    for a in range(size):
        members[a] = lists[i, a]
        mark[members[a]] = 2 * i + 1
    for a in range(sizes[i]):
        q = lists[i, a]
        common = 0
        for b in range(half_sizes[q]):
            common += mark[half_lists[q, b]] == 2 * i + 1
        if 3 * common > 2 * half_sizes[q]:
            for b in range(half_sizes[q]):
                j = half_lists[q, b]
                if mark[j] <= 2 * i:
                    mark[j] = 2 * i + 2
                    members[size] = j
                    size += 1
    return size


@kernel
def count_expanded(
    lists: Array,
    sizes: Array,
    half_lists: Array,
    half_sizes: Array,
    counts: Array,
    start: int,
    stop: int,
) -> None:
    """Count the members of each row's expanded list.

    Args:
        lists: Reciprocal lists, int32 ``(M, k1)``.
        sizes: Their sizes, int32 ``(M,)``.
        half_lists: Reciprocal lists of half the ranks, int32 ``(M, h)``.
        half_sizes: Their sizes, int32 ``(M,)``.
        counts: Output, int64 ``(M,)``.
        start: First row.
        stop: One past the last row.
    """
    mark = np.zeros(len(lists), np.int64)
    members = np.empty(lists.shape[1] * (1 + half_lists.shape[1]), np.int32)
    for i in range(start, stop):
        counts[i] = _expand(i, lists, sizes, half_lists, half_sizes, mark, members)


@kernel
def _known_similarity(
    i: int, j: int, similarity: Array, index: Array, features: Array
) -> Any:
    for a in range(index.shape[1]):
        if index[i, a] == j:
            return similarity[i, a]
    for a in range(index.shape[1]):
        if index[j, a] == i:
            return similarity[j, a]
    return dot(features[i], features[j])


@kernel
def membership_weights(
    features: Array,
    similarity: Array,
    index: Array,
    lists: Array,
    sizes: Array,
    half_lists: Array,
    half_sizes: Array,
    offsets: Array,
    columns: Array,
    weights: Array,
    start: int,
    stop: int,
) -> None:
    """Weight each row's expanded list by the softmax of the negative squared distance.

    Args:
        features: Unit vectors, float32 ``(M, C)``.
        similarity: Inner products with the neighbors, float32 ``(M, k)``.
        index: Neighbors, int32 ``(M, k)``.
        lists: Reciprocal lists, int32 ``(M, k1)``.
        sizes: Their sizes, int32 ``(M,)``.
        half_lists: Reciprocal lists of half the ranks, int32 ``(M, h)``.
        half_sizes: Their sizes, int32 ``(M,)``.
        offsets: Start of each row's entries, int64 ``(M + 1,)``.
        columns: Output: the members, int32 ``(offsets[M],)``.
        weights: Output: their weights, float32 ``(offsets[M],)``.
        start: First row.
        stop: One past the last row.
    """
    mark = np.zeros(len(lists), np.int64)
    for i in range(start, stop):
        first = offsets[i]
        members = columns[first : offsets[i + 1]]
        size = _expand(i, lists, sizes, half_lists, half_sizes, mark, members)
        total = 0.0
        for a in range(size):
            cosine = _known_similarity(i, members[a], similarity, index, features)
            weights[first + a] = np.exp(2 * cosine - 2)
            total += weights[first + a]
        for a in range(size):
            weights[first + a] /= total


@kernel
def _average_rows(
    i: int, index: Array, k2: int, offsets: Array, columns: Array, mark: Array, out: Array
) -> int:
    size = 0
    for a in range(k2):
        row = index[i, a]
        for p in range(offsets[row], offsets[row + 1]):
            if mark[columns[p]] != i:
                mark[columns[p]] = i
                out[size] = columns[p]
                size += 1
    return size


@kernel
def count_averaged(
    index: Array,
    k2: int,
    offsets: Array,
    columns: Array,
    counts: Array,
    start: int,
    stop: int,
) -> None:
    """Count the entries in the average of the rows of each row's first ``k2`` neighbors.

    Args:
        index: Neighbors by rank, int32 ``(M, >= k2)``.
        k2: Number of ranks to average.
        offsets: Start of each row's entries, int64 ``(M + 1,)``.
        columns: Columns of the entries, int32.
        counts: Output, int64 ``(M,)``.
        start: First row.
        stop: One past the last row.
    """
    mark = np.full(len(index), -1, np.int32)
    out = np.empty(len(index), np.int32)
    for i in range(start, stop):
        counts[i] = _average_rows(i, index, k2, offsets, columns, mark, out)


@kernel
def average_neighbors(
    index: Array,
    k2: int,
    offsets: Array,
    columns: Array,
    weights: Array,
    new_offsets: Array,
    new_columns: Array,
    new_weights: Array,
    start: int,
    stop: int,
) -> None:
    """Replace each row by the mean of the rows of its first ``k2`` neighbors.

    Args:
        index: Neighbors by rank, int32 ``(M, >= k2)``.
        k2: Number of ranks to average.
        offsets: Start of each row's entries, int64 ``(M + 1,)``.
        columns: Columns of the entries, int32.
        weights: Weights of the entries, float32.
        new_offsets: Start of each row's entries in the result, int64 ``(M + 1,)``.
        new_columns: Output: columns of the result.
        new_weights: Output: weights of the result.
        start: First row.
        stop: One past the last row.
    """
    mark = np.full(len(index), -1, np.int32)
    total = np.zeros(len(index), np.float32)
    for i in range(start, stop):
        first = new_offsets[i]
        out = new_columns[first : new_offsets[i + 1]]
        size = _average_rows(i, index, k2, offsets, columns, mark, out)
        for a in range(k2):
            row = index[i, a]
            for p in range(offsets[row], offsets[row + 1]):
                total[columns[p]] += weights[p]
        for a in range(size):
            new_weights[first + a] = total[out[a]] / np.float32(k2)
            total[out[a]] = 0


@kernel
def transpose(
    offsets: Array,
    columns: Array,
    weights: Array,
    t_offsets: Array,
    t_rows: Array,
    t_weights: Array,
) -> None:
    """Transpose a square sparse matrix; rows ascend within each column.

    Args:
        offsets: Start of each row's entries, int64 ``(M + 1,)``.
        columns: Columns of the entries, int32.
        weights: Weights of the entries, float32.
        t_offsets: Output: start of each column's entries, int64 ``(M + 1,)``.
        t_rows: Output: rows of the entries, int32.
        t_weights: Output: weights of the entries, float32.
    """
    num_rows = len(offsets) - 1
    t_offsets[:] = 0
    for p in range(len(columns)):
        t_offsets[columns[p] + 1] += 1
    for c in range(num_rows):
        t_offsets[c + 1] += t_offsets[c]
    place = t_offsets[:-1].copy()
    for i in range(num_rows):
        for p in range(offsets[i], offsets[i + 1]):
            c = columns[p]
            t_rows[place[c]] = i
            t_weights[place[c]] = weights[p]
            place[c] += 1


@kernel
def _grown(array: Array, size: int) -> Array:
    new = np.empty(2 * size, array.dtype)
    new[: len(array)] = array
    return new


@kernel
def _accumulate_overlap(
    i: int,
    least: float,
    offsets: Array,
    columns: Array,
    weights: Array,
    t_offsets: Array,
    t_rows: Array,
    t_weights: Array,
    shared: Array,
    overlapping: Array,
) -> Any:
    """Accumulate the overlap of later rows with row i over its first columns.

    The loop stops at the columns with a total weight below ``least``: a row that overlaps
    only in those is too far away.

    Returns:
        The first skipped entry, the total weight of the skipped entries, and the number of
        overlapping rows.
    """
    split, last = offsets[i], offsets[i + 1]
    remaining = 0.0
    for p in range(split, last):
        remaining += weights[p]
    num_overlapping = 0
    while split < last and (least <= 0 or remaining >= least):
        weight = weights[split]
        first = t_offsets[columns[split]]
        q = t_offsets[columns[split] + 1] - 1
        while q >= first and t_rows[q] > i:
            j = t_rows[q]
            if shared[j] == 0:
                overlapping[num_overlapping] = j
                num_overlapping += 1
            shared[j] += min(weight, t_weights[q])
            q -= 1
        remaining -= weight
        split += 1
    return split, remaining, num_overlapping


@kernel
def _remaining_overlap(
    j: int, first_column: int, offsets: Array, columns: Array, weights: Array, rest: Array
) -> Any:
    """Return the overlap of row j with ``rest`` in columns from ``first_column`` on."""
    total = np.float32(0)
    q = offsets[j + 1] - 1
    while q >= offsets[j] and columns[q] >= first_column:
        total += min(rest[columns[q]], weights[q])
        q -= 1
    return total


@kernel
def join_rows(
    offsets: Array,
    columns: Array,
    weights: Array,
    t_offsets: Array,
    t_rows: Array,
    t_weights: Array,
    max_distance: float,
    least: float,
    start: int,
    stop: int,
) -> tuple[Array, Array, Array]:
    """Compute the Jaccard distances of rows ``start..stop`` to all later rows.

    The overlap s of two rows is the sum of the smaller weight in each common column. Rows
    with an overlap of ``least`` have a common column among the first columns of either row,
    since the remaining columns weigh less than that; so only rows found there are compared
    in full.

    Args:
        offsets: Start of each row's entries, int64 ``(M + 1,)``.
        columns: Columns of the entries, ascending within a row, int32. Numbering them by
            increasing length is fastest, since the long columns then come last.
        weights: Weights of the entries, float32; each row sums to 1.
        t_offsets: Start of each column's entries, int64 ``(M + 1,)``.
        t_rows: Row of each entry, ascending within a column, int32.
        t_weights: Weights of the entries by column, float32.
        max_distance: Largest distance to keep; distances of 1 are never kept.
        least: Overlap of two rows at that distance, or slightly less.
        start: First row.
        stop: One past the last row.

    Returns:
        The number of kept distances per row, int64; and of all kept ones, by row and
        ascending column, the column (int32) and the distance (float32).
    """
    num_rows = len(offsets) - 1
    shared = np.zeros(num_rows, np.float32)
    rest = np.zeros(num_rows, np.float32)
    overlapping = np.empty(num_rows, np.int32)
    near = np.empty(num_rows, np.float32)
    counts = np.zeros(stop - start, np.int64)
    found = np.empty(1024, np.int32)
    distance = np.empty(1024, np.float32)
    size = 0
    by_row = (offsets, columns, weights)
    for i in range(start, stop):
        split, remaining, num_overlapping = _accumulate_overlap(
            i, least, *by_row, t_offsets, t_rows, t_weights, shared, overlapping
        )
        last = offsets[i + 1]
        rest[columns[split:last]] = weights[split:last]
        kept = 0
        for a in range(num_overlapping):
            j = overlapping[a]
            s = shared[j]
            shared[j] = 0
            if s + remaining < least:
                continue
            if split < last:
                s += _remaining_overlap(j, columns[split], *by_row, rest)
            d = np.float32(1) - s / (np.float32(2) - s)
            if d <= max_distance and d < 1:
                overlapping[kept], near[kept] = j, d
                kept += 1
        rest[columns[split:last]] = 0
        if size + kept > len(found):
            found = _grown(found, size + kept)
            distance = _grown(distance, size + kept)
        order = np.argsort(overlapping[:kept])
        found[size : size + kept] = overlapping[order]
        distance[size : size + kept] = near[order]
        size += kept
        counts[i - start] = kept
    return counts, found[:size].copy(), distance[:size].copy()


@kernel
def mirror(
    upper_offsets: Array,
    upper_columns: Array,
    upper: Array,
    offsets: Array,
    columns: Array,
    values: Array,
) -> None:
    """Build a symmetric matrix with zero diagonal from the entries above the diagonal.

    Args:
        upper_offsets: Start of each row's entries, int64 ``(M + 1,)``.
        upper_columns: Columns of the entries, ascending within a row, int32.
        upper: Values of the entries, float32.
        offsets: Output: start of each row's entries in the result, ``(M + 1,)``.
        columns: Output: columns, ascending within a row.
        values: Output: values, float32.
    """
    num_rows = len(offsets) - 1
    offsets[:] = 0
    for p in range(len(upper_columns)):
        offsets[upper_columns[p] + 1] += 1
    for i in range(num_rows):
        offsets[i + 1] += offsets[i] + 1 + upper_offsets[i + 1] - upper_offsets[i]
    place = offsets[:-1].copy()
    for i in range(num_rows):  # the smaller columns of row i are already written
        columns[place[i]] = i
        values[place[i]] = 0
        place[i] += 1
        for p in range(upper_offsets[i], upper_offsets[i + 1]):
            j = upper_columns[p]
            columns[place[i]] = j
            values[place[i]] = upper[p]
            place[i] += 1
            columns[place[j]] = i
            values[place[j]] = upper[p]
            place[j] += 1
