"""Direct implementation of the k-reciprocal Jaccard distance, for bench_clustering.py.

It uses dense matrices of all images by all images, and processes one image at a time, as
the scripts of clustering-based methods do. It is not optimized and not meant for training.
Three M x M matrices are in memory at once.

Shape shorthand: M images, C features.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


def dense_jaccard(features: Tensor, k1: int, k2: int) -> FloatArray:
    """Compute the distances between all images.

    Args:
        features: Unit vectors, float32 ``(M, C)`` on the CPU.
        k1: Nearest images used, including the image itself.
        k2: Ranks of the query expansion.

    Returns:
        Shape ``(M, M)``.
    """
    cosine = (features @ features.T).numpy()
    ranked = torch.topk(torch.from_numpy(cosine), k1, dim=1).indices.numpy()
    membership = _membership(cosine, ranked)
    del cosine
    if k2 > 1:
        averaged = np.empty_like(membership)
        for i in range(len(ranked)):
            averaged[i] = membership[ranked[i, :k2]].mean(axis=0)
        membership = averaged
    members = [np.flatnonzero(column) for column in membership.T]
    distance = np.empty_like(membership)
    for i, row in enumerate(membership):
        shared = np.zeros(len(row), np.float32)
        for column in np.flatnonzero(row):
            others = members[column]
            shared[others] += np.minimum(row[column], membership[others, column])
        distance[i] = 1 - shared / (2 - shared)
    return distance.clip(min=0)


def _membership(cosine: FloatArray, ranked: IntArray) -> FloatArray:
    k1 = ranked.shape[1]
    half = round(k1 / 2) + 1
    mutual = [_reciprocal(ranked, i, k1) for i in range(len(ranked))]
    half_mutual = [_reciprocal(ranked, i, half) for i in range(len(ranked))]
    membership = np.zeros_like(cosine)
    for i, own in enumerate(mutual):
        parts = [own]
        for q in own:
            if len(np.intersect1d(half_mutual[q], own)) > 2 / 3 * len(half_mutual[q]):
                parts.append(half_mutual[q])
        expanded = np.unique(np.concatenate(parts))
        weight = np.exp(2 * cosine[i, expanded] - 2)
        membership[i, expanded] = weight / weight.sum()
    return membership


def _reciprocal(ranked: IntArray, i: int, ranks: int) -> IntArray:
    near = ranked[i, :ranks]
    return near[(ranked[near, :ranks] == i).any(axis=1)]
