"""Sparse k-reciprocal Jaccard distance between images.

Two images are close if their neighborhoods overlap. The definition is that of Zhong et
al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017, in the
form used by clustering-based methods, without the mixture with the original distance:

1. R(i) holds those of the k1 nearest images of i (i itself is the first) that have i among
   their own k1 nearest; the half list H(i) uses ``round(k1 / 2) + 1`` ranks instead.
2. R(i) is expanded by H(q) for each q in R(i) with more than two thirds of H(q) in R(i).
3. V_i is the softmax of the negative squared distances to the members, 0 elsewhere.
4. V_i is replaced by the mean of V over the first k2 ranks of i.
5. With s = sum of min(V_i, V_j), the distance is 1 - s / (2 - s).

V has a few dozen entries per row, and only images that share an entry are closer than 1.
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

ROUNDING = 1e-6  # smaller distances are 0 up to rounding
ZERO = 1e-7  # value stored for them: a stored 0 looks like a missing entry


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
    """Compute the k-reciprocal Jaccard distances between all images.

    Args:
        features: Shape ``(M, C)``, on any device; L2-normalized here.
        k1: Nearest images used, including the image itself; at least 1, clamped to M.
        k2: Ranks of the query expansion, including the image itself; clamped to k1, 1 means
            none.
        max_distance: Largest distance to store; None stores all below 1. Smaller values are
            faster.
        neighbors: The ``k1`` or more nearest images if they are already known; otherwise
            they are searched.
        backend: ``"numba"``: compiled loops on the CPU; ``"torch"``: on the device of the
            features; ``"auto"``: torch on a GPU or if numba is not installed.

    Returns:
        ``scipy.sparse.csr_array`` of shape ``(M, M)``, float32, symmetric, with ascending
        columns. Entries that are not stored exceed ``max_distance``, or are 1 if that is
        None. A distance of 0 (up to rounding), as on the diagonal and between exact
        duplicates, is stored as 1e-7.

    Raises:
        ValueError: If the features are not a finite matrix, or an option is out of range.
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
    # Each backend is imported only when used: numba may be missing.
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
    result.has_canonical_format = True  # saves scipy the check
    return result


def _check_options(k1: int, k2: int, max_distance: float | None, backend: str) -> None:
    for name, value in (("k1", k1), ("k2", k2)):
        if value < 1:
            raise ValueError(
                f"{name} counts the image itself and must be at least 1, got {value}"
            )
    if max_distance is not None and not max_distance >= 0:
        raise ValueError(f"max_distance must be 0 or more, or None, got {max_distance}")
    if backend not in get_args(JaccardBackend):
        known = ", ".join(get_args(JaccardBackend))
        raise ValueError(f"backend must be one of {known}, got {backend!r}")


def unit_features(features: Tensor | NDArray[np.floating[Any]]) -> Tensor:
    """L2-normalize features that are not yet normalized.

    Args:
        features: Shape ``(M, C)``, on any device.

    Returns:
        Float32 ``(M, C)`` on the same device, without gradient; zero vectors stay zero.

    Raises:
        ValueError: If the features are not a finite matrix.
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
