"""Which bank rows an image is pulled towards and which it is pushed away from.

Shape shorthand in this module:

    B: images in the batch
    M: bank rows, one per training image
    K: neighbors per image; an image has 1 + K positives, column 0 is its own row
    N: negatives per image
    L: listed neighbors per bank row
    P: clusters present in a batch
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


@functools.lru_cache(maxsize=32)
def _warn_clamped(asked: tuple[int, int], used: tuple[int, int], num_images: int) -> None:
    # The cache makes this once per process and combination, not once per batch.
    logger.warning(
        "%d training images leave room for %d neighbors and %d negatives per image, "
        "not for the %d and %d asked for (NUM_NEIGHBORS, NUM_NEGATIVES)",
        num_images,
        *used,
        *asked,
    )


def clamp_counts(
    num_images: int, num_neighbors: int, num_negatives: int
) -> tuple[int, int]:
    """Fit K and N to a bank of M rows: K ≤ M - 1, then N ≤ M - 1 - K; 0 without rows.

    Warns once per process when the bank is too small for what was asked.

    Args:
        num_images: Bank rows M.
        num_neighbors: Neighbors K asked for.
        num_negatives: Negatives N asked for.

    Returns:
        The counts that fit, ``(K, N)``.
    """
    num_others = max(num_images - 1, 0)
    neighbors = min(num_neighbors, num_others)
    negatives = min(num_negatives, num_others - neighbors)
    if (neighbors, negatives) != (num_neighbors, num_negatives):
        _warn_clamped((num_neighbors, num_negatives), (neighbors, negatives), num_images)
    return neighbors, negatives


class Selection(NamedTuple):
    """Bank rows chosen for a batch.

    Attributes:
        positive_index: Int64 ``(B, 1 + K)``; column 0 is the own row.
        negative_index: Int64 ``(B, N)``.
        positive_mask: False where a positive is absent and its entry means nothing, bool
            ``(B, 1 + K)``; None if none is absent.
        negative_mask: The same for the negatives, ``(B, N)``.
    """

    positive_index: Tensor
    negative_index: Tensor
    positive_mask: Tensor | None = None
    negative_mask: Tensor | None = None


@torch.no_grad()
def select_neighbors(
    distance: Tensor, index: Tensor, *, num_neighbors: int, num_negatives: int
) -> tuple[Tensor, Tensor]:
    """Take the K nearest rows as positives and the next N as negatives.

    The rows beyond rank K + N play no part: the hardest non-neighbors are the negatives.
    An image's own row is always positive column 0 and nowhere else, whatever its distance,
    so exact duplicates of the image compete for the ranks like any other row.

    Args:
        distance: Smaller is closer, shape ``(B, M)``. Not modified.
        index: Own bank row of each image, int64, shape ``(B,)``.
        num_neighbors: Neighbors K, at least 0; clamped to M - 1.
        num_negatives: Negatives N, at least 0; clamped to M - 1 - K.

    Returns:
        ``positive_index`` of shape ``(B, 1 + K)`` and ``negative_index`` of shape ``(B,
        N)``, int64, both in order of distance after column 0.

    Example:
        >>> distance = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
        >>> select_neighbors(distance, torch.tensor([0]), num_neighbors=1, num_negatives=2)
        (tensor([[0, 2]]), tensor([[3, 1]]))
    """
    neighbors, negatives = clamp_counts(distance.shape[1], num_neighbors, num_negatives)
    others = distance.scatter(1, index[:, None], float("inf"))
    # topk, not a full sort: 507 of 12,936 are needed.
    nearest = others.topk(neighbors + negatives, dim=1, largest=False, sorted=True).indices
    positive_index = torch.cat([index[:, None], nearest[:, :neighbors]], dim=1)
    return positive_index, nearest[:, neighbors:]


@torch.no_grad()
def select_within_clusters(
    distance: Tensor,
    index: Tensor,
    labels: Tensor,
    *,
    num_neighbors: int,
    num_negatives: int,
    allowed_negatives: Tensor | None = None,
) -> Selection:
    """Take positives from the own cluster and negatives from outside, the nearest of each.

    A cluster smaller than 1 + K leaves positives absent. An outlier has no positive but
    itself; its K nearest rows that may be negatives, which may well show the same person,
    are neither, and the next N are its negatives.

    Args:
        distance: Smaller is closer, shape ``(B, M)``. Not modified.
        index: Own bank row of each image, int64, shape ``(B,)``.
        labels: Cluster of each bank row, -1 for outliers, int64, shape ``(M,)``.
        num_neighbors: Neighbors K, at least 0; clamped to M - 1.
        num_negatives: Negatives N, at least 0; clamped to M - 1 - K.
        allowed_negatives: Rows that may be negatives, bool, shape ``(B, M)``; None for all.

    Returns:
        Positives and negatives, nearest first, with their masks.

    Example:
        >>> distance = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> chosen = select_within_clusters(
        ...     distance, torch.tensor([0]), labels, num_neighbors=1, num_negatives=2
        ... )
        >>> chosen.positive_index, chosen.negative_index
        (tensor([[0, 1]]), tensor([[2, 3]]))
    """
    neighbors, negatives = clamp_counts(distance.shape[1], num_neighbors, num_negatives)
    own_label = labels[index][:, None]
    is_outlier = own_label < 0
    same = (own_label == labels[None, :]) & ~is_outlier
    others = distance.scatter(1, index[:, None], float("inf"))
    near, positive = others.masked_fill(~same, float("inf")).topk(
        neighbors, dim=1, largest=False, sorted=True
    )
    excluded = same if allowed_negatives is None else same | ~allowed_negatives
    far, negative = others.masked_fill(excluded, float("inf")).topk(
        neighbors + negatives, dim=1, largest=False, sorted=True
    )
    place = torch.arange(negatives, device=index.device) + neighbors * is_outlier  # (B, N)
    return Selection(
        torch.cat([index[:, None], positive], dim=1),
        negative.gather(1, place),
        torch.cat([torch.ones_like(is_outlier), near.isfinite()], dim=1),
        far.gather(1, place).isfinite(),
    )


@torch.no_grad()
def select_among(
    distance: Tensor, positive_index: Tensor, allowed: Tensor, *, num_negatives: int
) -> Selection:
    """Take the nearest allowed rows that are no positives as negatives.

    Args:
        distance: Smaller is closer, shape ``(B, M)``. Not modified.
        positive_index: Positives, int64, shape ``(B, P)``.
        allowed: Rows that may be negatives, bool, shape ``(B, M)``.
        num_negatives: Negatives N, at least 0; clamped to M - P.

    Returns:
        The positives, and the negatives, nearest first, with their mask.

    Example:
        >>> distance = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
        >>> allowed = torch.tensor([[True, True, False, True]])
        >>> chosen = select_among(distance, torch.tensor([[0]]), allowed, num_negatives=2)
        >>> chosen.negative_index
        tensor([[3, 1]])
    """
    count = min(num_negatives, distance.shape[1] - positive_index.shape[1])
    others = distance.masked_fill(~allowed, float("inf"))
    far, negative = others.scatter(1, positive_index, float("inf")).topk(
        count, dim=1, largest=False, sorted=True
    )
    return Selection(positive_index, negative, None, far.isfinite())


@torch.no_grad()
def prefer_listed(
    distance: Tensor, listed_index: Tensor, listed_distance: Tensor
) -> Tensor:
    """Put listed rows before all others, by their listed distance.

    Args:
        distance: Distances in [0, 5], shape ``(B, M)``: they rank the rows that are not
            listed. Not modified.
        listed_index: Rows listed for each image, int64, shape ``(B, L)``.
        listed_distance: Their distances in [0, 5], shape ``(B, L)``.

    Returns:
        Distances that rank the listed rows first, shape ``(B, M)``.
    """
    return (distance + 5.0).scatter(1, listed_index, listed_distance.to(distance))


def step_generator(seed: int, step: int) -> torch.Generator:
    """Make the random numbers of one training step.

    Seeded by the step and not by a running stream: a resumed run, and every rank of a
    distributed one, draws what the unbroken single run would.

    Args:
        seed: Seed of the run.
        step: Steps done so far.

    Returns:
        A CPU generator, so that CPU and GPU runs draw the same.
    """
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def draw_random_negatives(
    index: Tensor, *, num_images: int, num_negatives: int, generator: torch.Generator
) -> Tensor:
    """Draw negatives at random, the same for the whole batch but never an image's own row.

    One draw of N + 1 distinct rows serves all images: each leaves out its own row if it was
    drawn, else the last one. The draw does not depend on the batch, so that several
    processes with equally seeded generators draw what one process would.

    Args:
        index: Own bank row of each image, int64, shape ``(B,)``.
        num_images: Bank rows M.
        num_negatives: Negatives N; clamped to M - 1.
        generator: CPU generator; CPU and GPU runs draw the same rows.

    Returns:
        Bank rows, int64, shape ``(B, N)``, on the device of ``index``.
    """
    count = min(num_negatives, num_images - 1)
    drawn = torch.randperm(num_images, generator=generator)[: count + 1].to(index.device)
    is_own = drawn[None, :] == index[:, None]  # (B, N + 1)
    # Column of the row to leave out: the own one, or the last where the own was not drawn.
    left_out = torch.where(is_own.any(dim=1), is_own.int().argmax(dim=1), count)
    column = torch.arange(count, device=index.device)[None, :]
    return drawn[column + (column >= left_out[:, None])]


def draw_members(
    labels: Tensor, count: int, *, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw images of each cluster at random, none twice while others are left.

    The order in which images are drawn does not depend on the clusters' numbers.

    Args:
        labels: Cluster of each image, int64, shape ``(B,)``; -1 for an outlier, which is
            not drawn.
        count: Images per cluster; a cluster of fewer gives all of its images, again and
            again.
        generator: CPU generator; CPU and GPU runs draw the same images.

    Returns:
        The clusters present in ascending order, int64 ``(P,)``, and the positions of their
        images in ``labels``, int64 ``(P, count)``.

    Example:
        >>> labels = torch.tensor([4, 1, -1, 4])
        >>> clusters, positions = draw_members(labels, 2, generator=step_generator(0, 0))
        >>> clusters.tolist(), positions.sort(dim=1).values.tolist()
        ([1, 4], [[1, 1], [0, 3]])
    """
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    order = order[labels[order] >= 0]
    order = order[torch.argsort(labels[order], stable=True)]  # by cluster, shuffled within
    clusters, sizes = torch.unique_consecutive(labels[order], return_counts=True)
    first = sizes.cumsum(dim=0) - sizes
    place = torch.arange(count, device=labels.device) % sizes[:, None]
    return clusters, order[first[:, None] + place]
