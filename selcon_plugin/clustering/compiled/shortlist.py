"""Exact nearest neighbors on a CPU from fast, low-precision products.

The matrix of all inner products is symmetric: each block is computed once and serves the
images of its rows and of its columns. If the processor multiplies bfloat16 faster than
float32, blocks are computed in bfloat16, and only possible nearest neighbors are computed
again in float32.

The result is exact for the following reason. Let m be the mean feature and a' = a - m. Then

    a·b = a'·b' + s(a) + s(b),   s(a) = a·m - |m|²/2,

and a' is shorter than a if images resemble each other. Let â be a' rounded, and r the
largest |a' - â| / |a'| over all images, measured, not assumed. Then

    |a'·b' - â·b̂| <= |a' - â| |b̂| + |a'| |b' - b̂| <= r (2 + r) |a'| |b'|
                  <= r (1 + r/2) (|a'|² + |b'|²),

which splits into one term for a and one for b. The error of a sum of C products in float32,
in any order, is at most C 2^-24 |a| |b|; this bound is added for â·b̂ (twice, since not
every processor rounds to nearest between bfloat16 products) and for the float32 product
itself. Rounding the product p to bfloat16 adds 2^-9 |p|. Each product therefore gives an
interval that contains the float32 product; at least k other images reach the k-th largest
lower bound; and an image whose upper bound is below that is not among the k nearest.

Shape shorthand in this module:

    M: images
    C: feature dimension
    k: neighbors per image, including the image itself
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

BLOCK = 512  # side of a block of products, in images: 1 MiB, the size of a cache
MANY = 65_536  # from this many images on, larger blocks reduce Python's overhead
UNIT_ROUNDOFF = 2.0**-24  # of float32
# Slightly larger than 2^-9: relative to the rounded product, not the true one.
BFLOAT16_ROUNDOFF = 1.01 * 2.0**-9
SLACK = 4e-6  # covers the few float32 operations that add and compare the bounds


class _Rounded(NamedTuple):
    """Centered, rounded features with the error bounds of their products.

    Attributes:
        features: Shape ``(M, C)``, float32 or bfloat16.
        shift: s(a) of each image, float32 ``(M,)``.
        slack: Contribution of each image to the error bound, float32 ``(M,)``.
    """

    features: Tensor
    shift: Array
    slack: Array


def shortlist_neighbors(
    features: Tensor, k: int, *, dtype: torch.dtype | None = None
) -> Neighbors:
    """Find the k nearest images of each image; the first one is the image itself.

    Args:
        features: Unit vectors, float32 ``(M, C)`` on the CPU.
        k: Neighbors per image, including the image itself, 1 to M.
        dtype: Data type of the block products, float32 or bfloat16; by default the faster
            one on this processor. The result is the same.

    Returns:
        Similarities and image indices, ``(M, k)``.
    """
    if k == 1:
        return torch_neighbors(features, k)
    if dtype is None:
        dtype = torch.bfloat16 if bfloat16_is_faster() else torch.float32
    with RowThreads() as threads:
        found, overflowed = _search(threads, features.contiguous(), k, dtype)
    if len(overflowed):
        exact = torch_neighbors(features, k, overflowed)
        found.similarity[overflowed], found.index[overflowed] = exact
    return found


def _search(
    threads: RowThreads, features: Tensor, k: int, dtype: torch.dtype
) -> tuple[Neighbors, Tensor]:
    """Scan all products and rank the candidates.

    Args:
        threads: Threads that process the blocks.
        features: Float32 ``(M, C)``, contiguous.
        k: Neighbors per image, 2 to M.
        dtype: Data type of the block products.

    Returns:
        The neighbors, and the images without a result: images that are nearly or exactly
        equal to so many others that their candidates exceed the capacity.
    """
    num_images = len(features)
    rounded = _round(threads, features, dtype)
    capacity = 4 * k + 136  # measured: about 1.5 k candidates remain in the end
    threshold = np.full(num_images, -np.inf, np.float32)
    search = kernels.Search(
        wanted=k - 1,
        rounding=np.float32(BFLOAT16_ROUNDOFF if dtype == torch.bfloat16 else 0),
        shift=rounded.shift,
        slack=rounded.slack,
        threshold=threshold,
        counts=np.zeros(num_images, np.int64),
        candidates=np.empty((num_images, capacity), np.int32),
        products=np.empty((num_images, capacity), np.float32),
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
    ratio = float((lost / part.clamp_min(1e-30)).max()) ** 0.5  # r of the module docstring
    sums = UNIT_ROUNDOFF * dim * (2 * (1 + ratio) ** 2 * part + whole) / 2
    slack = ratio * (1 + ratio / 2) * part + sums + SLACK
    shift -= mean.double().square().sum() / 2
    return _Rounded(rounded, shift.float().numpy(), slack.float().numpy())


def _rounds(num_blocks: int) -> Iterator[tuple[list[int], list[int]]]:
    """Pair every block with itself and with every other block, as in a round robin.

    No block occurs twice in a round, so the pairs of a round can be processed in parallel,
    and the order in which a block is paired with the others is fixed.

    Args:
        num_blocks: Number of blocks of images.

    Yields:
        For each round, the first and the second blocks of its pairs.
    """
    yield list(range(num_blocks)), list(range(num_blocks))
    players = num_blocks + num_blocks % 2  # the last one stays fixed, possibly as a bye
    turning = players - 1
    for turn in range(turning):
        pairs = [(turn, turning)]
        for step in range(1, players // 2):
            one, other = (turn + step) % turning, (turn - step) % turning
            pairs.append((min(one, other), max(one, other)))
        real = [pair for pair in pairs if pair[1] < num_blocks]
        yield [one for one, _ in real], [other for _, other in real]


@functools.lru_cache(maxsize=1)
def bfloat16_is_faster() -> bool:
    """Return whether two timed products show that bfloat16 is faster on this processor."""

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(512, 512, dtype=dtype)
        best = float("inf")
        for _ in range(8):
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(torch.bfloat16) < 0.7 * seconds(torch.float32)
