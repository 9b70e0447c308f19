"""Compiled loops of the neighbor search.

A candidate j of image i has a product p known up to ``rounding * |p|``; its inner product
with i lies within ``slack[i] + slack[j] + rounding * |p|`` of ``shift[i] + shift[j] + p``.
At least ``wanted`` other images are known to reach ``threshold[i]``, so an image that
cannot reach it is not among the nearest ``wanted``.

Each call writes only data of the images in its rows (or columns) ``start..stop``. Both
scans append their candidates inline: a function call would cost more than the scan itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from selcon_plugin.clustering.compiled.rows import Array, dot, kernel

WORD = 8  # marks tested together as one 64-bit word


class Search(NamedTuple):
    """State of a search for the ``wanted`` nearest other images of M images.

    Attributes:
        wanted: Number of neighbors to find, at least 1, excluding the image itself.
        rounding: Relative error of a product.
        shift: Term that an image adds to its products, float32 ``(M,)``.
        slack: Term that an image adds to the error bound, float32 ``(M,)``.
        threshold: Lower bound described above, float32 ``(M,)``; infinite for an image
            whose candidates exceed the capacity.
        counts: Number of candidates of each image, int64 ``(M,)``.
        candidates: Indices of the candidates, int32 ``(M, capacity)``.
        products: Products with the candidates, float32 ``(M, capacity)``.
    """

    wanted: int
    rounding: np.float32
    shift: Array
    slack: Array
    threshold: Array
    counts: Array
    candidates: Array
    products: Array


@kernel
def _select(values: Array, rank: int) -> Any:
    """Return the value of the given rank by quickselect; reorders the values."""
    low, high = 0, len(values) - 1
    while low < high:
        first, middle, last = values[low], values[(low + high) >> 1], values[high]
        pivot = max(min(first, middle), min(max(first, middle), last))
        left, right = low, high
        while left <= right:
            while values[left] < pivot:
                left += 1
            while values[right] > pivot:
                right -= 1
            if left <= right:
                values[left], values[right] = values[right], values[left]
                left += 1
                right -= 1
        if rank <= right:
            high = right
        elif rank >= left:
            low = left
        else:
            break
    return values[rank]


@kernel
def _compact(i: int, search: Search) -> None:
    """Raise the threshold of image i as far as proven, and drop candidates below it."""
    count, shift, slack = search.counts[i], search.shift, search.slack
    candidates, products = search.candidates[i], search.products[i]
    if count < search.wanted:
        return
    reached = np.empty(count, np.float32)
    for a in range(count):
        j, p = candidates[a], products[a]
        center = p + (shift[i] - slack[i]) + (shift[j] - slack[j])
        reached[a] = center - search.rounding * abs(p)
    reached_by_enough = _select(reached, count - search.wanted)
    search.threshold[i] = max(search.threshold[i], reached_by_enough)
    kept = 0
    for a in range(count):
        j, p = candidates[a], products[a]
        center = p + (shift[i] + slack[i]) + (shift[j] + slack[j])
        if center + search.rounding * abs(p) >= search.threshold[i]:
            candidates[kept], products[kept] = j, p
            kept += 1
    search.counts[i] = kept


@kernel
def _make_room(i: int, search: Search) -> None:
    capacity = search.candidates.shape[1]
    _compact(i, search)
    if search.counts[i] > capacity - capacity // 4:  # too many similar images: give up
        search.threshold[i] = np.inf
        search.counts[i] = 0


@kernel
def _mark(
    products: Array, limits: Array, least: float, rounding: np.float32, marks: Array
) -> None:
    """Mark the products that may reach ``least``; the compiler vectorizes this loop."""
    for a in range(len(products)):
        p = products[a]
        marks[a] = p + rounding * abs(p) + limits[a] >= least


@kernel
def scan_rows(
    block: Array, first_row: int, first_column: int, search: Search, start: int, stop: int
) -> None:
    """Add candidates from the columns of a block of products to its row images."""
    shift, slack, threshold = search.shift, search.slack, search.threshold
    counts, candidates, products = search.counts, search.candidates, search.products
    capacity = candidates.shape[1]
    rounding, width = search.rounding, block.shape[1]
    columns = slice(first_column, first_column + width)
    limits = shift[columns] + slack[columns]
    marks = np.zeros((width + WORD - 1) // WORD * WORD, np.bool_)
    words = marks.view(np.uint64)
    for r in range(start, stop):
        i = first_row + r
        row = block[r]
        own = shift[i] + slack[i]
        _mark(row, limits, threshold[i] - own, rounding, marks)
        for w in range(len(words)):
            if not words[w]:
                continue
            for c in range(WORD * w, min(WORD * w + WORD, width)):
                j, p = first_column + c, row[c]
                if j != i and p + rounding * abs(p) + limits[c] >= threshold[i] - own:
                    candidates[i, counts[i]], products[i, counts[i]] = j, p
                    counts[i] += 1
                    if counts[i] == capacity:
                        _make_room(i, search)


@kernel
def scan_columns(
    block: Array, first_row: int, first_column: int, search: Search, start: int, stop: int
) -> None:
    """Add candidates from the rows of a block of products to its column images."""
    shift, slack, threshold = search.shift, search.slack, search.threshold
    counts, candidates, products = search.counts, search.candidates, search.products
    capacity = candidates.shape[1]
    rounding, width = search.rounding, stop - start
    images = slice(first_column + start, first_column + stop)
    reach = shift[images] + slack[images]
    limits = reach - threshold[images]
    marks = np.zeros((width + WORD - 1) // WORD * WORD, np.bool_)
    words = marks.view(np.uint64)
    for r in range(block.shape[0]):
        row = block[r, start:stop]
        i = first_row + r
        own = shift[i] + slack[i]
        _mark(row, limits, -own, rounding, marks)
        for w in range(len(words)):
            if not words[w]:
                continue
            for c in range(WORD * w, min(WORD * w + WORD, width)):
                j, p = first_column + start + c, row[c]
                if p + rounding * abs(p) + limits[c] >= -own:
                    candidates[j, counts[j]], products[j, counts[j]] = i, p
                    counts[j] += 1
                    if counts[j] == capacity:
                        _make_room(j, search)
                    limits[c] = reach[c] - threshold[j]


@kernel
def rank_candidates(
    features: Array,
    search: Search,
    similarity: Array,
    index: Array,
    start: int,
    stop: int,
) -> None:
    """Rank the remaining candidates by float32 inner products; ties by smaller index.

    Args:
        features: Float32 ``(M, C)``.
        search: Search state after all products have been scanned.
        similarity: Output, the image itself first, float32 ``(M, 1 + wanted)``.
        index: Output, int64 ``(M, 1 + wanted)``.
        start: First row.
        stop: One past the last row.
    """
    for i in range(start, stop):
        similarity[i, 0] = dot(features[i], features[i])
        index[i, 0] = i
        if search.threshold[i] == np.inf:
            continue
        _compact(i, search)
        images = np.sort(search.candidates[i, : search.counts[i]])
        exact = np.empty(len(images), np.float32)
        for a in range(len(images)):
            exact[a] = dot(features[i], features[images[a]])
        order = np.argsort(-exact, kind="mergesort")[: search.wanted]
        similarity[i, 1:] = exact[order]
        index[i, 1:] = images[order]
