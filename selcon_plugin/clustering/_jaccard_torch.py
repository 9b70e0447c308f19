"""Jaccard distance by tensor operations, for GPUs and for CPUs without numba.

The work is split into pieces of bounded size; no tensor grows with the square of the number
of images.

Shape shorthand in this module:

    M: images
    k1: ranks of the k-reciprocal lists
    h: ranks of the half lists
    R: rows processed at a time
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

# Elements in the largest tensor of a piece, by device type.
PIECE = {"cuda": 2**25}
PIECE_ELSEWHERE = 2**22
SUMS = {"cuda": 2**28}  # the dense sums of the join need no other tensors of their size
SUMS_ELSEWHERE = 2**24


class _Rows(NamedTuple):
    """Sparse matrix in CSR form.

    Attributes:
        offsets: Start of each row's entries, int64 ``(M + 1,)``.
        columns: Columns of the entries, int64, ascending within a row.
        weights: Weights of the entries, float32.
    """

    offsets: Tensor
    columns: Tensor
    weights: Tensor

    @classmethod
    def joined(cls, pieces: list[tuple[Tensor, Tensor, Tensor]]) -> _Rows:
        """Concatenate pieces of counts per row, columns and weights."""
        counts, columns, weights = (torch.cat(part) for part in zip(*pieces, strict=True))
        return cls(_offsets(counts), columns, weights)

    def transposed(self) -> _Rows:
        """Return the transposed matrix."""
        num_rows = len(self.offsets) - 1
        order = self.columns.argsort(stable=True)
        row = _repeated(torch.arange(num_rows, device=order.device), self.offsets.diff())
        counts = torch.bincount(self.columns, minlength=num_rows)
        return _Rows(_offsets(counts), row[order], self.weights[order])


def jaccard_rows(
    features: Tensor,
    index: Tensor,
    *,
    half: int,
    k2: int,
    max_distance: float,
) -> tuple[Array, Array, Array]:
    """Compute the sparse Jaccard distances from the nearest neighbors.

    Args:
        features: Unit vectors, float32 ``(M, C)``.
        index: Neighbors by rank, the image itself first, int64 ``(M, k1)``.
        half: Ranks of the half lists, at most k1.
        k2: Ranks of the query expansion, at most k1.
        max_distance: Largest distance to store; distances of 1 are never stored.

    Returns:
        ``indptr``, ``indices`` and ``data`` of the matrix in CSR form, in CPU memory.
    """
    index = index.to(features.device)
    rows = _membership(features, index, half)
    if k2 > 1:
        rows = _expand_queries(index[:, :k2], rows)
    pieces = list(_join(rows, max_distance))
    counts, columns, distance = (np.concatenate(part) for part in zip(*pieces, strict=True))
    index_type = np.int32 if len(columns) < 2**31 else np.int64
    indptr = np.concatenate([np.zeros(1, np.int64), counts.cumsum()]).astype(index_type)
    return indptr, columns.astype(index_type, copy=False), distance


def _size(sizes: dict[str, int], elsewhere: int, device: torch.device) -> int:
    return sizes.get(device.type, elsewhere)


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(dim=0)])


def _repeated(values: Tensor, counts: Tensor) -> Tensor:
    return values.repeat_interleave(counts, dim=0)


def _positions(starts: Tensor, counts: Tensor) -> Tensor:
    """Concatenate the ranges ``starts[i] .. starts[i] + counts[i] - 1``."""
    ends = counts.cumsum(dim=0)
    total = int(ends[-1]) if len(ends) else 0
    run = torch.arange(total, device=starts.device)
    return run + _repeated(starts - ends + counts, counts)


def _ranges(work: Tensor, limit: int, max_rows: int) -> Iterator[tuple[int, int]]:
    """Split rows into ranges with at most ``limit`` work each, or of a single row."""
    total = work.cumsum(dim=0).cpu().numpy()
    start, done = 0, 0
    while start < len(total):
        stop = int(np.searchsorted(total, done + limit, side="right"))
        stop = min(max(stop, start + 1), start + max_rows, len(total))
        yield start, stop
        start, done = stop, int(total[stop - 1])


def _reciprocal(index: Tensor, width: int) -> Tensor:
    """Keep the mutual ones among the first ``width`` neighbors; -1 marks the others."""
    index = index[:, :width]
    limit = _size(PIECE, PIECE_ELSEWHERE, index.device)
    pieces = []
    rows = torch.arange(len(index), device=index.device)
    for near in torch.split(rows, max(1, limit // width**2)):
        lists = index[near]
        mutual = (index[lists] == near[:, None, None]).any(dim=2)
        pieces.append(torch.where(mutual, lists, -1))
    return torch.cat(pieces)


def _membership(features: Tensor, index: Tensor, half: int) -> _Rows:
    """Compute the weights of the members of each image's expanded reciprocal list."""
    num_images, k1 = index.shape
    lists, half_lists = _reciprocal(index, k1), _reciprocal(index, half)
    half_sizes = (half_lists >= 0).sum(dim=1)
    limit = _size(PIECE, PIECE_ELSEWHERE, index.device)
    pieces = []
    for start in range(0, num_images, max(1, limit // (k1 * half * k1))):
        rows = slice(start, start + max(1, limit // (k1 * half * k1)))
        members = _expand(lists[rows], half_lists, half_sizes)
        row, place = (members >= 0).nonzero(as_tuple=True)
        column = members[row, place]
        counts = torch.bincount(row, minlength=len(members))
        weights = _softmax(features, row + start, column, row, len(members))
        pieces.append((counts, column, weights))
    return _Rows.joined(pieces)


def _expand(lists: Tensor, half_lists: Tensor, half_sizes: Tensor) -> Tensor:
    """Expand each list by the half lists that overlap it by more than two thirds.

    Args:
        lists: Reciprocal lists, padded with -1, ``(R, k1)``.
        half_lists: Half lists of all images, padded with -1, ``(M, h)``.
        half_sizes: Lengths of the half lists, ``(M,)``.

    Returns:
        The distinct members in ascending order, with -1 elsewhere, ``(R, k1 + k1 * h)``.
    """
    others = half_lists[lists]  # padding reads the list of image M - 1; masked below
    inside = (others[:, :, :, None] == lists[:, None, None, :]).any(dim=3) & (others >= 0)
    joins = (lists >= 0) & (3 * inside.sum(dim=2) > 2 * half_sizes[lists])
    others = torch.where(joins[:, :, None], others, -1)
    members = torch.cat([lists, others.flatten(1)], dim=1).sort(dim=1).values
    members[:, 1:][members[:, 1:] == members[:, :-1]] = -1
    return members


def _softmax(
    features: Tensor, image: Tensor, member: Tensor, row: Tensor, num_rows: int
) -> Tensor:
    limit = _size(PIECE, PIECE_ELSEWHERE, features.device)
    step = max(1, limit // max(1, features.shape[1]))
    pairs = zip(torch.split(image, step), torch.split(member, step), strict=True)
    cosine = torch.cat([(features[a] * features[b]).sum(dim=1) for a, b in pairs])
    weights = torch.exp(2 * cosine - 2)
    total = weights.new_zeros(num_rows).index_add_(0, row, weights)
    return weights / total[row]


def _expand_queries(index: Tensor, rows: _Rows) -> _Rows:
    """Average the rows of each image's neighbors ``(M, k2)``."""
    num_images, k2 = index.shape
    counts = rows.offsets.diff()
    limit = _size(PIECE, PIECE_ELSEWHERE, index.device)
    pieces = []
    for start, stop in _ranges(counts[index].sum(dim=1), limit, num_images):
        near = index[start:stop].flatten()
        row = torch.arange(stop - start, device=index.device).repeat_interleave(k2)
        entry = _positions(rows.offsets[near], counts[near])
        key = _repeated(row, counts[near]) * num_images + rows.columns[entry]
        key, place = torch.unique(key, return_inverse=True)
        total = rows.weights.new_zeros(len(key)).index_add_(0, place, rows.weights[entry])
        sizes = torch.bincount(key // num_images, minlength=stop - start)
        pieces.append((sizes, key % num_images, total / k2))
    return _Rows.joined(pieces)


def _join(rows: _Rows, max_distance: float) -> Iterator[tuple[Array, Array, Array]]:
    """Yield counts per row, columns and distances of the pairs within the distance."""
    num_images = len(rows.offsets) - 1
    device = rows.columns.device
    columns = rows.transposed()
    length = columns.offsets.diff()
    work = _offsets(length[rows.columns])[rows.offsets].diff()
    max_rows = max(1, _size(SUMS, SUMS_ELSEWHERE, device) // num_images)
    limit = _size(PIECE, PIECE_ELSEWHERE, device)
    for start, stop in _ranges(work, limit, max_rows):
        entries = slice(int(rows.offsets[start]), int(rows.offsets[stop]))
        column, weight = rows.columns[entries], rows.weights[entries]
        row = _repeated(
            torch.arange(stop - start, device=device), rows.offsets[start : stop + 1].diff()
        )
        entry = _positions(columns.offsets[column], length[column])
        place = _repeated(row * num_images, length[column]) + columns.columns[entry]
        smaller = torch.minimum(_repeated(weight, length[column]), columns.weights[entry])
        shared = weight.new_zeros((stop - start) * num_images)
        shared = shared.index_add_(0, place, smaller).view(stop - start, num_images)
        distance = shared.div_(2 - shared).neg_().add_(1)
        own = torch.arange(start, stop, device=device)
        distance[own - start, own] = 0
        near, other = ((distance <= max_distance) & (distance < 1)).nonzero(as_tuple=True)
        yield (
            torch.bincount(near, minlength=stop - start).cpu().numpy(),
            other.int().cpu().numpy(),
            distance[near, other].cpu().numpy(),
        )
