"""Compiled loops of the Jaccard distance.

Sparse rows are stored one after the other: ``offsets (M + 1,)`` says where each row starts,
``columns`` and ``weights`` hold its entries. ``start`` and ``stop`` bound the rows that a
call works on.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from selcon_plugin.clustering.compiled.rows import Array, dot, kernel


@kernel
def reciprocal_lists(
    index: Array, width: int, lists: Array, sizes: Array, start: int, stop: int
) -> None:
    """Keep the first ``width`` neighbors of a row that have the row among theirs.

    Args:
        index: Neighbors by rank, column 0 the row itself, int32 ``(M, >= width)``.
        width: Ranks that count.
        lists: Written: what is kept, in order of rank, int32 ``(M, width)``.
        sizes: Written: how many are kept, int32 ``(M,)``.
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
    # mark[j] is 2i + 1 while j is in the list of i, 2i + 2 once it joined by expansion;
    # i only grows, so that the marks of earlier rows need no clearing.
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
        counts: Written, int64 ``(M,)``.
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
    """Weigh each row's expanded list by the softmax of minus the squared distance.

    Args:
        features: Unit vectors, float32 ``(M, C)``.
        similarity: Inner products with the neighbors, float32 ``(M, k)``.
        index: The neighbors, int32 ``(M, k)``.
        lists: Reciprocal lists, int32 ``(M, k1)``.
        sizes: Their sizes, int32 ``(M,)``.
        half_lists: Reciprocal lists of half the ranks, int32 ``(M, h)``.
        half_sizes: Their sizes, int32 ``(M,)``.
        offsets: Where each row's entries start, int64 ``(M + 1,)``.
        columns: Written: the members, int32 ``(offsets[M],)``.
        weights: Written: their weights, float32 ``(offsets[M],)``.
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
    """Count the entries of each row's average over its first ``k2`` neighbors.

    Args:
        index: Neighbors by rank, int32 ``(M, >= k2)``.
        k2: Ranks averaged.
        offsets: Where each row's entries start, int64 ``(M + 1,)``.
        columns: Entries, int32.
        counts: Written, int64 ``(M,)``.
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
        k2: Ranks averaged.
        offsets: Where each row's entries start, int64 ``(M + 1,)``.
        columns: Entries, int32.
        weights: Entries, float32.
        new_offsets: The same for the result, int64 ``(M + 1,)``.
        new_columns: Written.
        new_weights: Written.
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
    """Turn a square matrix from rows to columns; rows ascend within each column.

    Args:
        offsets: Where each row's entries start, int64 ``(M + 1,)``.
        columns: Entries, int32.
        weights: Entries, float32.
        t_offsets: Written: where each column's entries start, int64 ``(M + 1,)``.
        t_rows: Written, int32.
        t_weights: Written, float32.
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
def _meet(
    i: int,
    least: float,
    offsets: Array,
    columns: Array,
    weights: Array,
    t_offsets: Array,
    t_rows: Array,
    t_weights: Array,
    shared: Array,
    met: Array,
) -> Any:
    """Add up what later rows share with row i in its first columns.

    Stops before the columns that together weigh less than ``least``: a row that shares only
    those is too far.

    Returns:
        The first entry left out, the weight of those left out, and the number of rows met.
    """
    split, last = offsets[i], offsets[i + 1]
    remaining = 0.0
    for p in range(split, last):
        remaining += weights[p]
    num_met = 0
    while split < last and (least <= 0 or remaining >= least):
        weight = weights[split]
        first = t_offsets[columns[split]]
        q = t_offsets[columns[split] + 1] - 1
        while q >= first and t_rows[q] > i:
            j = t_rows[q]
            if shared[j] == 0:
                met[num_met] = j
                num_met += 1
            shared[j] += min(weight, t_weights[q])
            q -= 1
        remaining -= weight
        split += 1
    return split, remaining, num_met


@kernel
def _compare(
    j: int, first_column: int, offsets: Array, columns: Array, weights: Array, rest: Array
) -> Any:
    """Add up what row j shares with ``rest``, which has columns from the first on."""
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
    """Take the Jaccard distances of rows ``start..stop`` to all later rows.

    Two rows share s, the sum of the smaller weight of each common column. Rows that share
    ``least`` meet in one of the first columns of either, the others weighing less than
    that; so only rows met there are compared in full.

    Args:
        offsets: Where each row's entries start, int64 ``(M + 1,)``.
        columns: Entries, ascending within a row, int32. Best numbered by rising length, so
            that the long columns come last.
        weights: Entries, float32; each row's sum is 1.
        t_offsets: Where each column's entries start, int64 ``(M + 1,)``.
        t_rows: Row of each entry, ascending within a column, int32.
        t_weights: Entries, float32.
        max_distance: Keep what is at most this, and below 1.
        least: What two rows share at that distance, or a little less.
        start: First row.
        stop: One past the last row.

    Returns:
        For each row the number kept, int64; and of all kept, row by row with ascending
        columns, the column (int32) and the distance (float32).
    """
    num_rows = len(offsets) - 1
    shared = np.zeros(num_rows, np.float32)
    rest = np.zeros(num_rows, np.float32)
    met = np.empty(num_rows, np.int32)
    near = np.empty(num_rows, np.float32)
    counts = np.zeros(stop - start, np.int64)
    found = np.empty(1024, np.int32)
    distance = np.empty(1024, np.float32)
    size = 0
    by_row = (offsets, columns, weights)
    for i in range(start, stop):
        split, remaining, num_met = _meet(
            i, least, *by_row, t_offsets, t_rows, t_weights, shared, met
        )
        last = offsets[i + 1]
        rest[columns[split:last]] = weights[split:last]
        kept = 0
        for a in range(num_met):
            j = met[a]
            s = shared[j]
            shared[j] = 0
            if s + remaining < least:
                continue
            if split < last:
                s += _compare(j, columns[split], *by_row, rest)
            d = np.float32(1) - s / (np.float32(2) - s)
            if d <= max_distance and d < 1:
                met[kept], near[kept] = j, d
                kept += 1
        rest[columns[split:last]] = 0
        if size + kept > len(found):
            found = _grown(found, size + kept)
            distance = _grown(distance, size + kept)
        order = np.argsort(met[:kept])
        found[size : size + kept] = met[order]
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
    """Complete a symmetric matrix from the entries above its diagonal, which is 0.

    Args:
        upper_offsets: Where each row's entries start, int64 ``(M + 1,)``.
        upper_columns: Entries, ascending within a row, int32.
        upper: Entries, float32.
        offsets: Written: where each row's entries start in the result, ``(M + 1,)``.
        columns: Written, ascending within a row.
        values: Written, float32.
    """
    num_rows = len(offsets) - 1
    offsets[:] = 0
    for p in range(len(upper_columns)):
        offsets[upper_columns[p] + 1] += 1
    for i in range(num_rows):
        offsets[i + 1] += offsets[i] + 1 + upper_offsets[i + 1] - upper_offsets[i]
    place = offsets[:-1].copy()
    for i in range(num_rows):  # row i has had its smaller columns by now
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
