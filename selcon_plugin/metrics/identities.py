"""Metrics of neighbors and clusters against ground-truth identities.

This is the only core module that uses identities; nothing here is used for training.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from selcon_plugin.clustering.pseudo_labels import OUTLIER, outliers_as_singletons
from selcon_plugin.clustering.quality import adjusted_mutual_info, contingency


def neighbor_precision(anchors: Tensor, neighbors: Tensor, pids: Tensor) -> float:
    """Compute the fraction of neighbors with the same identity as their anchor.

    Args:
        anchors: Image index of each anchor, shape ``(B,)``.
        neighbors: Image indices of its neighbors, shape ``(B, K)``, K at least 1.
        pids: Identity of every image, shape ``(M,)``; -1 where unknown, which counts
            as no match.

    Returns:
        Fraction in [0, 1].

    Example:
        >>> import torch
        >>> pids = torch.tensor([5, 5, 6])
        >>> neighbor_precision(torch.tensor([0]), torch.tensor([[1, 2]]), pids)
        0.5
    """
    anchor_pids = pids[anchors][:, None]
    matches = (pids[neighbors] == anchor_pids) & (anchor_pids >= 0)
    return matches.float().mean().item()


def cluster_diagnostics(labels: Tensor, pids: Tensor) -> dict[str, float]:
    """Compare clusters with identities over the images of known identity.

    Args:
        labels: Cluster of each image, int64 ``(M,)``, -1 for an outlier. Outliers are in no
            pair, and each is a singleton cluster in ``ami``.
        pids: Identity of each image, int64 ``(M,)``, -1 where unknown.

    Returns:
        ``purity``: fraction of the clustered images with the most frequent identity of
        their cluster. ``ami``: adjusted mutual information of clusters and identities.
        ``pair_precision``: fraction of the pairs in a cluster with the same identity;
        ``pair_recall``: fraction of the pairs of an identity in the same cluster. A
        fraction of an empty set is NaN.

    Raises:
        ValueError: If the two differ in length.

    Example:
        >>> import torch
        >>> pids = torch.tensor([5, 5, 6, 6])
        >>> found = cluster_diagnostics(torch.tensor([0, 0, 0, -1]), pids)
        >>> round(found["purity"], 3), round(found["pair_precision"], 3)
        (0.667, 0.333)
    """
    if labels.shape != pids.shape:
        raise ValueError(
            "labels and pids must belong to the same images, got shapes "
            f"{tuple(labels.shape)} and {tuple(pids.shape)}"
        )
    known = pids >= 0
    found, identity = labels[known].cpu().numpy(), pids[known].cpu().numpy()
    inside = found != OUTLIER
    table = contingency(found[inside], identity[inside])
    same = _pairs(table.data)
    most_frequent = table.max(axis=1).toarray().sum() if table.nnz else 0.0
    clusters = np.bincount(found[inside]) if table.nnz else np.zeros(0)
    identities = np.unique(identity, return_counts=True)[1]
    return {
        "purity": _fraction(most_frequent, inside.sum()),
        "ami": adjusted_mutual_info(outliers_as_singletons(found), identity)
        if len(identity)
        else math.nan,
        "pair_precision": _fraction(same, _pairs(clusters)),
        "pair_recall": _fraction(same, _pairs(identities)),
    }


def _pairs(counts: NDArray[np.floating[Any]] | NDArray[np.integer[Any]]) -> float:
    """Return the number of pairs within groups of these sizes."""
    sizes = counts.astype(np.float64)
    return float((sizes * (sizes - 1)).sum() / 2)


def _fraction(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan
