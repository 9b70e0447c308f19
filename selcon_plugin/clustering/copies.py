"""Images with equal features, such as copies of one file, which belong to one person.

The k-reciprocal Jaccard distance is not made for them: of more copies than an image has
neighbors, each one lists the same few, which do not list it in return, so that most copies
share no neighbor with another one. Up to ``round(k1 / 2) + 1`` copies, the length of the
half lists, all list each other, and the distances are those of the definition. Of more
copies only so many take part, and each further one gets the distances of the first one.

Copies are not exactly equal: a product of matrices rounds the same row differently in
batches of other sizes.

Shape shorthand in this module:

    M: images
    C: feature dimension
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from selcon_plugin.clustering.jaccard import ZERO, jaccard_distance
from selcon_plugin.clustering.neighbors import Neighbors
from selcon_plugin.clustering.pseudo_labels import OUTLIER

logger = logging.getLogger(__name__)

# Largest distance of unit features of one picture in float32; different pictures of one
# person are a thousand times as far apart.
TOLERANCE = 1e-5
_PROJECTIONS, _SORTINGS, _FOLLOWERS = 8, 3, 8
_ROWS_AT_ONCE = 65_536
# The distances among this many copies take 50 MB.
_MANY = 2_500


@torch.no_grad()
def copy_groups(features: Tensor) -> NDArray[np.int64]:
    """Find images with equal features, up to rounding.

    Copies are neighbors in the order of any projection, so only images that follow each
    other closely in three such orders, and agree in eight projections, are compared.

    Args:
        features: Unit vectors ``(M, C)``, on any device.

    Returns:
        For each image the first one with equal features, int64 ``(M,)``; the image itself
        where there is no other, and for rows that are zero.
    """
    num_images, dim = features.shape
    directions = torch.randn(
        dim, _PROJECTIONS, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    directions = (directions / directions.norm(dim=0)).to(features.device)
    blocks = torch.split(features, _ROWS_AT_ONCE)
    place = torch.cat([block.double() @ directions for block in blocks]).cpu().numpy()
    pairs = []
    for column in range(_SORTINGS):
        order = np.argsort(place[:, column], kind="stable")
        for step in range(1, min(_FOLLOWERS, num_images - 1) + 1):
            first, second = order[:-step], order[step:]
            near = np.abs(place[first] - place[second]).max(axis=1) <= TOLERANCE
            pairs.append(np.stack([first[near], second[near]]))
    first, second = np.concatenate(pairs, axis=1) if pairs else np.empty((2, 0), np.int64)
    equal = _are_equal(features, first, second)
    graph = sparse.coo_array(
        (np.ones(int(equal.sum()), dtype=np.int8), (first[equal], second[equal])),
        shape=(num_images, num_images),
    )
    component = connected_components(graph, directed=False)[1]
    leader = np.full(num_images, num_images, dtype=np.int64)
    np.minimum.at(leader, component, np.arange(num_images))
    groups: NDArray[np.int64] = leader[component]
    return groups


def _are_equal(
    features: Tensor, first: NDArray[np.int64], second: NDArray[np.int64]
) -> NDArray[np.bool_]:
    equal = np.zeros(len(first), dtype=bool)
    for start in range(0, len(first), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        one = features[torch.from_numpy(first[part]).to(features.device)]
        other = features[torch.from_numpy(second[part]).to(features.device)]
        is_same = (one - other).norm(dim=1) <= TOLERANCE
        equal[part] = (is_same & (one.norm(dim=1) > 0.5)).cpu().numpy()
    return equal


def distances_with_copies(
    features: Tensor,
    *,
    k1: int,
    k2: int,
    max_distance: float | None = None,
    neighbors: Neighbors | None = None,
) -> Any:
    """Compute the Jaccard distances of images some of which may be copies.

    Args:
        features: Unit vectors ``(M, C)``, on any device.
        k1: As for :func:`~selcon_plugin.clustering.jaccard.jaccard_distance`.
        k2: As above.
        max_distance: As above.
        neighbors: As above; used only if no more images are equal than the half lists hold.

    Returns:
        The result of ``jaccard_distance`` if no more images are equal than the half lists
        hold; otherwise the result for that many copies of each image, repeated for the
        further ones. Its diagonal is stored.
    """
    options: dict[str, Any] = {"k1": k1, "k2": k2, "max_distance": max_distance}
    groups = copy_groups(features)
    most = int(np.bincount(groups).max(initial=0))
    half = round(k1 / 2) + 1
    if most <= half:
        return jaccard_distance(features, neighbors=neighbors, **options)
    kept = _rank_in_group(groups) < half
    number = np.cumsum(kept) - 1
    number[~kept] = number[groups[~kept]]
    logger.info("%d of %d images are further copies of others", (~kept).sum(), len(kept))
    if most > _MANY:
        logger.warning(
            "%d images have equal features: %d million distances are stored among them",
            most,
            most**2 // 10**6,
        )
    several = features[torch.from_numpy(kept).to(features.device)]
    return _repeat(jaccard_distance(several, **options), number)


def _rank_in_group(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many earlier images belong to the group of each image."""
    order = np.argsort(groups, kind="stable")
    starts = np.cumsum(np.bincount(groups)) - np.bincount(groups)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order)) - starts[groups[order]]
    return rank


def _repeat(distance: Any, number: NDArray[np.int64]) -> Any:
    """Return the distances of images of which image i is a copy of image ``number[i]``."""
    num_images = len(number)
    copies = sparse.coo_array(
        (np.ones(num_images, dtype=np.float32), (np.arange(num_images), number)),
        shape=(num_images, distance.shape[0]),
    ).tocsr()
    # Each row and column of `copies` selects: the products copy values without rounding.
    result = (copies @ distance @ copies.T).tocsr()
    result.data = np.maximum(result.data, np.float32(ZERO)).astype(np.float32)
    result.sort_indices()
    return result


def unite_copies(
    labels: NDArray[np.int64], groups: NDArray[np.int64], smallest: int = 2
) -> NDArray[np.int64]:
    """Give all copies of an image the same label.

    Args:
        labels: Cluster of each image, -1 for an outlier, ``(M,)``.
        groups: Result of :func:`copy_groups`.
        smallest: Number of copies that are a cluster of their own if none is in a cluster.

    Returns:
        The labels, in which copies have the label of the cluster that most of them are in.

    Example:
        >>> unite_copies(np.array([0, -1, -1, -1, 0]), np.array([0, 0, 2, 2, 4])).tolist()
        [0, 0, 1, 1, 0]
    """
    result = labels.copy()
    next_label = labels.max(initial=OUTLIER) + 1
    order = np.argsort(groups, kind="stable")
    sizes = np.bincount(groups, minlength=len(groups))
    ends = np.cumsum(sizes)
    for leader in np.flatnonzero(sizes > 1):
        members = order[ends[leader] - sizes[leader] : ends[leader]]
        inside = labels[members][labels[members] != OUTLIER]
        if len(inside):
            result[members] = np.bincount(inside).argmax()
        elif len(members) >= smallest:
            result[members] = next_label
            next_label += 1
    return result
