"""Exact nearest neighbors on a CPU from fast, inexact products.

The product of all images with all images is symmetric: each block of it is multiplied once
and serves the images of its rows and of its columns. Where the processor multiplies
bfloat16 faster than float32, that is used, and only what could be among the nearest is
multiplied again in float32.

Why the result is exact. Let m be the mean feature and a' = a - m. Then

    a·b = a'·b' + s(a) + s(b),   s(a) = a·m - |m|²/2,

and a' is shorter than a where images resemble each other. Let â be a' rounded, and r the
largest |a' - â| / |a'| over all images, measured, not assumed. Then

    |a'·b' - â·b̂| <= |a' - â| |b̂| + |a'| |b' - b̂| <= r (2 + r) |a'| |b'|
                  <= r (1 + r/2) (|a'|² + |b'|²),

which splits into one term for a and one for b. A sum of C products in float32, in whatever
order, is off by at most C 2^-24 |a| |b|; that is added for â·b̂ (twice, since not every
processor rounds to nearest between bfloat16 products) and for the float32 product itself.
Rounding the product p to bfloat16 adds 2^-9 |p|. So each product gives an interval that
holds the float32 product; at least k others reach the k-th largest lower end; and an image
whose upper end lies below that is none of the k nearest.

Shape shorthand in this module:

    M: images
    C: feature dimension
    k: neighbors per image, the image itself included
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from selcon_plugin.clustering.compiled import knn_kernels as kernels
from selcon_plugin.clustering.compiled.rows import Array, RowThreads
from selcon_plugin.clustering.neighbors import Neighbors, torch_neighbors

BLOCK = 512  # images of one side of a block of products: 1 MiB, the size of a cache
MANY = 65_536  # images from which larger blocks spare Python some work
UNIT_ROUNDOFF = 2.0**-24  # of float32
BFLOAT16_ROUNDOFF = (
    1.01 * 2.0**-9
)  # a little more: of the rounded product, not the true one
SLACK = 4e-6  # for the few float32 operations that add and compare the bounds


class _Rounded(NamedTuple):
    """The centered, rounded features and what their products can be trusted to.

    Attributes:
        features: Shape ``(M, C)``, float32 or bfloat16.
        shift: s(a) of each image, float32 ``(M,)``.
        slack: Each image's share in the error bound, float32 ``(M,)``.
    """

    features: Tensor
    shift: Array
    slack: Array


def shortlist_neighbors(
    features: Tensor, k: int, *, dtype: torch.dtype | None = None
) -> Neighbors:
    """Find the k nearest images of each image, itself first.

    Args:
        features: Vectors of unit length, float32 ``(M, C)`` on the CPU.
        k: Neighbors per image, itself included, 1 to M.
        dtype: float32 or bfloat16: what blocks are multiplied in; by default what is faster
            on this processor. The result is the same.

    Returns:
        Similarities and images, ``(M, k)``.
    """
    if k == 1:
        return torch_neighbors(features, k)
    if dtype is None:
        dtype = torch.bfloat16 if bfloat16_is_faster() else torch.float32
    with RowThreads() as threads:
        found, alike = _search(threads, features.contiguous(), k, dtype)
    if len(alike):
        found.similarity[alike], found.index[alike] = torch_neighbors(features, k, alike)
    return found


def _search(
    threads: RowThreads, features: Tensor, k: int, dtype: torch.dtype
) -> tuple[Neighbors, Tensor]:
    """Scan all products and rank the candidates.

    Args:
        threads: To share the blocks among.
        features: Float32 ``(M, C)``, contiguous.
        k: Neighbors per image, 2 to M.
        dtype: What blocks are multiplied in.

    Returns:
        The neighbors, and the images whose are not found: those with more candidates than
        room, being almost or exactly like many others.
    """
    num_images = len(features)
    rounded = _round(threads, features, dtype)
    room = 4 * k + 136  # measured: about 1.5 k candidates are left in the end
    threshold = np.full(num_images, -np.inf, np.float32)
    search = kernels.Search(
        wanted=k - 1,
        rounding=np.float32(BFLOAT16_ROUNDOFF if dtype == torch.bfloat16 else 0),
        shift=rounded.shift,
        slack=rounded.slack,
        threshold=threshold,
        counts=np.zeros(num_images, np.int64),
        candidates=np.empty((num_images, room), np.int32),
        products=np.empty((num_images, room), np.float32),
    )
    side = BLOCK if num_images < MANY else 2 * BLOCK

    def scan(first_row: int, first_column: int) -> None:
        rows = rounded.features[first_row : first_row + side]
        columns = rounded.features[first_column : first_column + side]
        block = torch.mm(rows, columns.T).float().numpy()
        place = (first_row, first_column)
        kernels.scan_rows(block, *place, search, 0, len(rows))
        if first_row != first_column:
            kernels.scan_columns(block, *place, search, 0, len(columns))

    for pairs in _rounds(-(-num_images // side)):
        threads.map(scan, *([side * block for block in part] for part in pairs))
    similarity = np.empty((num_images, k), np.float32)
    index = np.empty((num_images, k), np.int64)
    threads.run(
        partial(kernels.rank_candidates, features.numpy(), search, similarity, index),
        num_images,
    )
    found = Neighbors(torch.from_numpy(similarity), torch.from_numpy(index))
    return found, torch.from_numpy(np.isposinf(threshold)).nonzero()[:, 0]


def _round(threads: RowThreads, features: Tensor, dtype: torch.dtype) -> _Rounded:
    num_images, dim = features.shape
    mean = features.mean(dim=0)
    rounded = torch.empty(num_images, dim, dtype=dtype)
    lengths = torch.empty(3, num_images, dtype=torch.float64)
    shift = torch.empty(num_images, dtype=torch.float64)

    def work(start: int, stop: int) -> None:
        rows = slice(start, stop)
        centered = features[rows] - mean
        rounded[rows] = centered
        lost = centered - rounded[rows]
        for length, vectors in zip(lengths, (features[rows], centered, lost), strict=True):
            length[rows] = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64)
        shift[rows] = features[rows].double() @ mean.double()

    threads.run(work, num_images)
    whole, part, lost = lengths.square()
    share = float((lost / part.clamp_min(1e-30)).max()) ** 0.5
    sums = UNIT_ROUNDOFF * dim * (2 * (1 + share) ** 2 * part + whole) / 2
    slack = share * (1 + share / 2) * part + sums + SLACK
    shift -= mean.double().square().sum() / 2
    return _Rounded(rounded, shift.float().numpy(), slack.float().numpy())


def _rounds(num_blocks: int) -> Iterator[tuple[list[int], list[int]]]:
    """Pair every block with itself and with every other, as a round robin does.

    No block occurs twice in a round, so that the pairs of a round can be worked on at the
    same time, and the order in which a block meets the others is always the same.

    Args:
        num_blocks: Blocks of images.

    Yields:
        For each round the first and the second blocks of its pairs.
    """
    yield list(range(num_blocks)), list(range(num_blocks))
    players = num_blocks + num_blocks % 2  # the last one sits still, perhaps as a bye
    turning = players - 1
    for turn in range(turning):
        pairs = [(turn, turning)]
        for step in range(1, players // 2):
            one, other = (turn + step) % turning, (turn - step) % turning
            pairs.append((min(one, other), max(one, other)))
        met = [pair for pair in pairs if pair[1] < num_blocks]
        yield [one for one, _ in met], [other for _, other in met]


@functools.lru_cache(maxsize=1)
def bfloat16_is_faster() -> bool:
    """Time two small products: whether this processor multiplies bfloat16 faster."""

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(512, 512, dtype=dtype)
        best = float("inf")
        for _ in range(8):
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(torch.bfloat16) < 0.7 * seconds(torch.float32)
