"""Selection of positive and negative memory-bank rows for each image of a batch.

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
def _warn_clamped(
    requested: tuple[int, int], used: tuple[int, int], num_images: int
) -> None:
    # The cache limits this to one warning per process and combination.
    logger.warning(
        "%d training images allow only %d neighbors and %d negatives per image, not the "
        "requested %d and %d (NUM_NEIGHBORS, NUM_NEGATIVES)",
        num_images,
        *used,
        *requested,
    )


def clamp_counts(
    num_images: int, num_neighbors: int, num_negatives: int
) -> tuple[int, int]:
    """Clamp K and N to a bank of M rows: K ≤ M - 1, then N ≤ M - 1 - K; 0 without rows.

    It warns once per process if the bank is too small for the requested counts.

    Args:
        num_images: Bank rows M.
        num_neighbors: Requested neighbors K.
        num_negatives: Requested negatives N.

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
    """Bank rows selected for a batch.

    Attributes:
        positive_index: Rows of the positives, int64 ``(B, 1 + K)``; column 0 is the own
            row.
        negative_index: Rows of the negatives, int64 ``(B, N)``.
        positive_mask: Validity of the positives, bool ``(B, 1 + K)``; False marks an absent
            one, whose row is meaningless. None if none is absent.
        negative_mask: Validity of the negatives, bool ``(B, N)``.
    """

    positive_index: Tensor
    negative_index: Tensor
    positive_mask: Tensor | None = None
    negative_mask: Tensor | None = None


@torch.no_grad()
def select_neighbors(
    distance: Tensor, index: Tensor, *, num_neighbors: int, num_negatives: int
) -> tuple[Tensor, Tensor]:
    """Select the K nearest rows as positives and the next N as negatives.

    The hardest non-neighbors are the negatives; rows beyond rank K + N are not used. An
    image's own row is always positive column 0 and nowhere else, whatever its distance, so
    exact duplicates of the image compete for the ranks like any other row.

    Args:
        distance: Smaller is closer, shape ``(B, M)``. Not modified.
        index: Own bank row of each image, int64, shape ``(B,)``.
        num_neighbors: Neighbors K, at least 0; clamped to M - 1.
        num_negatives: Negatives N, at least 0; clamped to M - 1 - K.

    Returns:
        ``positive_index`` of shape ``(B, 1 + K)`` and ``negative_index`` of shape ``(B,
        N)``, int64, both sorted by distance after column 0.

    Example:
        >>> distance = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
        >>> select_neighbors(distance, torch.tensor([0]), num_neighbors=1, num_negatives=2)
        (tensor([[0, 2]]), tensor([[3, 1]]))
    """
    neighbors, negatives = clamp_counts(distance.shape[1], num_neighbors, num_negatives)
    others = distance.scatter(1, index[:, None], float("inf"))
    # topk instead of a full sort: only 507 of 12,936 are needed.
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
    """Select the nearest positives in the own cluster and the nearest negatives outside.

    In a cluster smaller than 1 + K some positives are absent. The only positive of an
    outlier is itself; its K nearest allowed rows, which are likely to show the same person,
    are neither positives nor negatives, and the next N are its negatives.

    Args:
        distance: Smaller is closer, shape ``(B, M)``. Not modified.
        index: Own bank row of each image, int64, shape ``(B,)``.
        labels: Cluster of each bank row, -1 for outliers, int64, shape ``(M,)``.
        num_neighbors: Neighbors K, at least 0; clamped to M - 1.
        num_negatives: Negatives N, at least 0; clamped to M - 1 - K.
        allowed_negatives: Mask of rows allowed as negatives, bool, shape ``(B, M)``; None
            allows all.

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
    """Select the nearest allowed rows that are not positives as negatives.

    Args:
        distance: Smaller is closer, shape ``(B, M)``. Not modified.
        positive_index: Positives, int64, shape ``(B, P)``.
        allowed: Mask of rows allowed as negatives, bool, shape ``(B, M)``.
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
    """Rank listed rows before all others, by their listed distance.

    Args:
        distance: Distances in [0, 5] that rank the rows that are not listed, shape
            ``(B, M)``. Not modified.
        listed_index: Listed rows of each image, int64, shape ``(B, L)``.
        listed_distance: Distances of the listed rows in [0, 5], shape ``(B, L)``.

    Returns:
        Distances that rank the listed rows first, shape ``(B, M)``.
    """
    return (distance + 5.0).scatter(1, listed_index, listed_distance.to(distance))


def step_generator(seed: int, step: int) -> torch.Generator:
    """Create the random generator of one training step.

    It is seeded by the step instead of continuing a stream: a resumed run, and every rank
    of a distributed run, samples the same as an uninterrupted single-process run.

    Args:
        seed: Seed of the run.
        step: Number of completed steps.

    Returns:
        A CPU generator, so that CPU and GPU runs sample the same.
    """
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def draw_random_negatives(
    index: Tensor, *, num_images: int, num_negatives: int, generator: torch.Generator
) -> Tensor:
    """Sample random negatives, shared by the batch except for each image's own row.

    One sample of N + 1 distinct rows serves all images: each image omits its own row if it
    was sampled, and the last row otherwise. The sample does not depend on the batch, so
    several processes with equally seeded generators sample the same as a single process.

    Args:
        index: Own bank row of each image, int64, shape ``(B,)``.
        num_images: Bank rows M.
        num_negatives: Negatives N; clamped to M - 1.
        generator: CPU generator; CPU and GPU runs sample the same rows.

    Returns:
        Bank rows, int64, shape ``(B, N)``, on the device of ``index``.
    """
    count = min(num_negatives, num_images - 1)
    rows = torch.randperm(num_images, generator=generator)[: count + 1].to(index.device)
    is_own = rows[None, :] == index[:, None]  # (B, N + 1)
    # Column of the row to omit: the own row, or the last one if the own was not sampled.
    omitted = torch.where(is_own.any(dim=1), is_own.int().argmax(dim=1), count)
    column = torch.arange(count, device=index.device)[None, :]
    return rows[column + (column >= omitted[:, None])]


def draw_members(
    labels: Tensor, count: int, *, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Sample images of each cluster at random, without replacement as far as possible.

    The sampling order does not depend on the numbering of the clusters.

    Args:
        labels: Cluster of each image, int64, shape ``(B,)``; -1 for an outlier, which is
            not sampled.
        count: Images per cluster; the images of a smaller cluster are repeated cyclically.
        generator: CPU generator; CPU and GPU runs sample the same images.

    Returns:
        The clusters in the batch in ascending order, int64 ``(P,)``, and the positions of
        their sampled images in ``labels``, int64 ``(P, count)``.

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
