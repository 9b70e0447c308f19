"""Exact chunked nearest-neighbor search, and the result type of all searches.

Shape shorthand in this module:

    M: images
    C: feature dimension
    k: neighbors per image, including the image itself
    R: rows processed at a time
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 1_024  # rows of one product
PRODUCTS = {"cuda": 2**28}  # inner products held at once, by device type
PRODUCTS_ELSEWHERE = 2**24
GROUP = 32  # columns represented by their maximum in the first stage of a top-k


class Neighbors(NamedTuple):
    """Nearest neighbors of each image; the first one is the image itself.

    Attributes:
        similarity: Inner products, float32 ``(M, k)``, descending from column 1 on.
        index: Image indices, int64 ``(M, k)``. Column 0 is the image itself, even among
            exact duplicates; ties are ordered by ascending index.
    """

    similarity: Tensor
    index: Tensor  # type: ignore[assignment]  # hides the unused tuple.index


def _largest_of_few(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest values of each row by one top-k; ties go to the smaller column."""
    if count >= values.shape[1]:
        return values.sort(dim=1, descending=True, stable=True)
    top, column = values.topk(count + 1, dim=1)
    tied = (top[:, count - 1] == top[:, count]).nonzero()[:, 0]
    top, column = top[:, :count], column[:, :count].clone()
    if len(tied):  # top-k breaks ties arbitrarily: take the first columns instead
        rows, last = values[tied], top[tied, -1:]
        equal = rows == last
        missing = count - (rows > last).sum(dim=1, keepdim=True)
        taken = (rows > last) | (equal & (equal.cumsum(dim=1) <= missing))
        column[tied] = taken.nonzero()[:, 1].view(len(tied), count)
    column = column.sort(dim=1).values
    top, order = values.gather(1, column).sort(dim=1, descending=True, stable=True)
    return top, column.gather(1, order)


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest values of each row in descending order.

    Ties go to the smaller column. The largest values lie in the groups of columns with the
    largest maxima, so the final top-k sees only few columns.

    Args:
        values: Shape ``(R, N)``.
        count: Number of values per row, at least 1.

    Returns:
        Values and columns, both ``(R, min(count, N))``.
    """
    num_rows, width = values.shape
    num_groups = width // GROUP
    if num_groups < 4 * (count + 1):
        return _largest_of_few(values, count)
    grouped = values[:, : num_groups * GROUP].view(num_rows, num_groups, GROUP)
    group = _largest_of_few(grouped.amax(dim=2), count + 1)[1].sort(dim=1).values
    within = torch.arange(GROUP, device=values.device)
    columns = (group[:, :, None] * GROUP + within).flatten(1)
    rest = torch.arange(num_groups * GROUP, width, device=values.device)
    columns = torch.cat([columns, rest.expand(num_rows, -1)], dim=1)
    top, place = _largest_of_few(values.gather(1, columns), count)
    return top, columns.gather(1, place)


def torch_neighbors(features: Tensor, k: int, rows: Tensor | None = None) -> Neighbors:
    """Find neighbors by chunked matrix products on the device of the features.

    Args:
        features: Unit vectors, float32 ``(M, C)``.
        k: Neighbors per image, including itself, 1 to M.
        rows: Query images, int64 ``(R,)``; all images if None.

    Returns:
        The neighbors of the query images, ``(R, k)``.
    """
    if rows is None:
        rows = torch.arange(len(features), device=features.device)
    pieces = [_neighbors_of(features, k, piece) for piece in torch.split(rows, ROWS)]
    return Neighbors(*(torch.cat(part) for part in zip(*pieces, strict=True)))


def _neighbors_of(features: Tensor, k: int, rows: Tensor) -> Neighbors:
    width = max(1, PRODUCTS.get(features.device.type, PRODUCTS_ELSEWHERE) // ROWS)
    own = features[rows]
    similarity = own.new_empty(len(rows), 0)
    index = rows.new_empty(len(rows), 0)
    for start in range(0, len(features) if k > 1 else 0, width):
        products = own @ features[start : start + width].T
        here = ((rows >= start) & (rows < start + width)).nonzero()[:, 0]
        products[here, rows[here] - start] = -torch.inf
        top, column = _largest(products, k - 1)
        similarity = torch.cat([similarity, top], dim=1)
        index = torch.cat([index, column + start], dim=1)
        similarity, place = _largest_of_few(similarity, k - 1)
        index = index.gather(1, place)
    return Neighbors(
        torch.cat([(own * own).sum(dim=1, keepdim=True), similarity[:, : k - 1]], dim=1),
        torch.cat([rows[:, None], index[:, : k - 1]], dim=1),
    )
