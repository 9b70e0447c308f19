"""The k-reciprocal Jaccard distance as its definition reads: for bench_clustering.py.

Dense matrices of all images by all images, one image after the other, as the scripts of
clustering-based methods have it. Nothing here is optimized and nothing is meant to be used
for training. Three matrices of M x M numbers are alive at once.

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
    """Take the distance of all images to all images.

    Args:
        features: Unit vectors, float32 ``(M, C)`` in main memory.
        k1: Nearest images looked at, the image itself included.
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
