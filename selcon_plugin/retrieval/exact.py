"""Exact search for nearest neighbors among the rows of an index."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

_ROWS_AT_ONCE = 16_384


class Rows(Protocol):
    """Features ``(N, D)`` in memory or on disk."""

    @property
    def shape(self) -> tuple[int, ...]:
        """N and D."""
        ...

    def __len__(self) -> int:
        """Return N."""
        ...

    def __getitem__(self, rows: Any, /) -> NDArray[Any]:
        """Return rows by slice or by numbers."""
        ...


def search_exactly(
    queries: NDArray[np.float32],
    features: Rows,
    rows: NDArray[np.int64],
    count: int,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Find the nearest rows of a subset; among equal ones the first wins.

    Args:
        queries: Features of the queries, shape ``(Q, D)``.
        features: Features of the index, shape ``(N, D)``.
        rows: Rows to compare with, in ascending order.
        count: Number of rows per query.

    Returns:
        Similarities and rows ``(Q, count)``, filled with -inf and -1 where there are fewer.
    """
    best = np.full((len(queries), count), -np.inf, dtype=np.float32)
    found = np.full((len(queries), count), -1, dtype=np.int64)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        block = rows[start : start + _ROWS_AT_ONCE]
        products = queries @ features[block].astype(np.float32).T
        for number, values in enumerate(products):
            # Only values above the worst so far count: a tie with it has a later row.
            columns = np.flatnonzero(values > best[number, -1])
            if len(columns) > count:
                limit = np.partition(values[columns], -count)[-count]
                columns = columns[values[columns] >= limit]
            value = np.concatenate([best[number], values[columns]])
            row = np.concatenate([found[number], block[columns]])
            order = np.argsort(-value, kind="stable")[:count]
            best[number], found[number] = value[order], row[order]
    return best, found
