"""k-reciprocal Jaccard distance between images, sparse from end to end.

Two images are close when their neighborhoods overlap. The definition is that of Zhong et
al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017, in the
form that methods with clusters use, without the mixture with the original distance:

1. R(i) holds those of the k1 nearest images of i (i itself is the first) that have i among
   their own k1 nearest; the half list H(i) does the same with ``round(k1 / 2) + 1`` ranks.
2. R(i) is joined by H(q) for each q in R(i) with more than two thirds of H(q) in R(i).
3. V_i is the softmax of the negative squared distances to the members, 0 elsewhere.
4. V_i is replaced by the mean of V over the first k2 ranks of i.
5. With s = sum of min(V_i, V_j), the distance is 1 - s / (2 - s).

V has some dozens of entries in a row, and only images that share one are closer than 1.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from selcon_plugin.clustering.knn import check_finite, nearest_neighbors
from selcon_plugin.clustering.neighbors import Neighbors

logger = logging.getLogger(__name__)

JaccardBackend = Literal["auto", "numba", "torch"]

ROUNDING = 1e-6  # distances up to this one are 0 but for rounding
ZERO = 1e-7  # stored for them: a sparse matrix cannot tell 0 from absence


@torch.no_grad()
def jaccard_distance(
    features: Tensor | NDArray[np.floating[Any]],
    *,
    k1: int = 30,
    k2: int = 6,
    max_distance: float | None = None,
    neighbors: Neighbors | None = None,
    backend: JaccardBackend = "auto",
) -> Any:
    """Take the k-reciprocal Jaccard distance of all images to all images.

    Args:
        features: Shape ``(M, C)``, on any device; scaled to unit length.
        k1: Nearest images looked at, the image itself included; at least 1. Where there are
            fewer images, all of them.
        k2: Ranks of the query expansion, the image itself included, at most k1 count; 1
            means none.
        max_distance: Keep distances up to this one; None keeps all below 1. The smaller,
            the faster.
        neighbors: The ``k1`` or more nearest images if they are known already, else they
            are searched for.
        backend: ``"numba"``: compiled loops on the CPU; ``"torch"``: on the device of the
            features; ``"auto"``: torch on a GPU or where numba is not installed.

    Returns:
        ``scipy.sparse.csr_array`` of shape ``(M, M)``, float32, symmetric, with ascending
        columns. What is not stored is further than ``max_distance``, 1 if that is None. A
        distance of 0 (up to rounding), which the diagonal and exact duplicates have, is
        stored as 1e-7.

    Raises:
        ValueError: If the features are no matrix or not finite, or an option is out of
            range.
    """
    _check_options(k1, k2, max_distance, backend)
    features = unit_features(features)
    num_images = len(features)
    if num_images == 0:
        return sparse.csr_array((0, 0), dtype=np.float32)
    if neighbors is None:
        neighbors = nearest_neighbors(features, k1)
    width = min(k1, num_images)
    if neighbors.index.shape[0] != num_images or neighbors.index.shape[1] < width:
        raise ValueError(
            f"neighbors must hold at least {width} columns for {num_images} images, got "
            f"{tuple(neighbors.index.shape)}: call nearest_neighbors(features, k1)"
        )
    options: dict[str, Any] = {
        "half": min(round(k1 / 2) + 1, width),
        "k2": min(k2, width),
        "max_distance": 1.0
        if max_distance is None
        else max(ROUNDING, min(1, max_distance)),
    }
    near = Neighbors(*(part[:, :width].contiguous() for part in neighbors))
    if backend == "auto":
        has_numba = importlib.util.find_spec("numba") is not None
        backend = "numba" if has_numba and not features.is_cuda else "torch"
        logger.info("Jaccard distance of %d images: %s", num_images, backend)
    # Either is loaded only where it is used: numba may be missing.
    if backend == "numba":
        from selcon_plugin.clustering.compiled.jaccard_rows import jaccard_rows

        indptr, indices, data = jaccard_rows(
            features.cpu().contiguous().numpy(),
            near.similarity.cpu().numpy(),
            near.index.int().cpu().numpy(),
            **options,
        )
    else:
        from selcon_plugin.clustering import _jaccard_torch

        indptr, indices, data = _jaccard_torch.jaccard_rows(features, near.index, **options)
    data[data <= ROUNDING] = ZERO
    result = sparse.csr_array((data, indices, indptr), shape=(num_images, num_images))
    result.has_canonical_format = True  # spares scipy the look
    return result


def _check_options(k1: int, k2: int, max_distance: float | None, backend: str) -> None:
    for name, value in (("k1", k1), ("k2", k2)):
        if value < 1:
            raise ValueError(f"{name} counts the image itself: at least 1, got {value}")
    if max_distance is not None and not max_distance >= 0:
        raise ValueError(f"max_distance must be 0 or more, or None, got {max_distance}")
    if backend not in get_args(JaccardBackend):
        known = ", ".join(get_args(JaccardBackend))
        raise ValueError(f"backend must be one of {known}, got {backend!r}")


def unit_features(features: Tensor | NDArray[np.floating[Any]]) -> Tensor:
    """Scale features to unit length, unless they have it.

    Args:
        features: Shape ``(M, C)``, on any device.

    Returns:
        Float32 ``(M, C)`` on the same device, without gradient; a vector of zeros stays.

    Raises:
        ValueError: If the features are no matrix or not finite.
    """
    features = torch.as_tensor(features)
    if features.dim() != 2:
        raise ValueError(f"features must be (M, C), got shape {tuple(features.shape)}")
    features = features.detach().float()
    check_finite(features)
    length = features.norm(dim=1, keepdim=True)
    if bool(((length - 1).abs() <= 1e-6).all()):
        return features
    return F.normalize(features, dim=1)
