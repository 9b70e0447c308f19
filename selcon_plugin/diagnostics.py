"""How good neighbours and clusters are. The only core module that knows identities.

Nothing here is used for training.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from selcon_plugin.clustering.pseudo_labels import OUTLIER, outliers_alone
from selcon_plugin.clustering.quality import adjusted_mutual_info, contingency


def neighbor_precision(anchors: Tensor, neighbors: Tensor, true_pids: Tensor) -> float:
    """Share of neighbours that show the same identity as their anchor.

    Args:
        anchors: Image index of each anchor, shape ``(B,)``.
        neighbors: Image indices of its neighbours, shape ``(B, K)``, K at least 1.
        true_pids: Identity of every image, shape ``(M,)``; -1 where unknown, which counts
            as no match.

    Returns:
        Share in [0, 1].

    Example:
        >>> import torch
        >>> pids = torch.tensor([5, 5, 6])
        >>> neighbor_precision(torch.tensor([0]), torch.tensor([[1, 2]]), pids)
        0.5
    """
    anchor_pids = true_pids[anchors][:, None]
    matches = (true_pids[neighbors] == anchor_pids) & (anchor_pids >= 0)
    return matches.float().mean().item()


def cluster_diagnostics(labels: Tensor, true_pids: Tensor) -> dict[str, float]:
    """Compare clusters with the identities, over the images whose identity is known.

    Args:
        labels: Cluster of each image, int64 ``(M,)``, -1 for an outlier. Outliers are in no
            pair, and each is a cluster of its own in ``ami``.
        true_pids: Identity of each image, int64 ``(M,)``, -1 where unknown.

    Returns:
        ``purity``: share of the clustered images that show the most frequent identity of
        their cluster. ``ami``: adjusted mutual information of clusters and identities.
        ``pair_precision``: share of the pairs in one cluster that show one identity;
        ``pair_recall``: share of the pairs of one identity that are in one cluster. NaN
        where there is nothing to take a share of.

    Raises:
        ValueError: If the two differ in length.

    Example:
        >>> import torch
        >>> pids = torch.tensor([5, 5, 6, 6])
        >>> found = cluster_diagnostics(torch.tensor([0, 0, 0, -1]), pids)
        >>> round(found["purity"], 3), round(found["pair_precision"], 3)
        (0.667, 0.333)
    """
    if labels.shape != true_pids.shape:
        raise ValueError(
            "labels and true_pids must be of the same images, got shapes "
            f"{tuple(labels.shape)} and {tuple(true_pids.shape)}"
        )
    known = true_pids >= 0
    found, pids = labels[known].cpu().numpy(), true_pids[known].cpu().numpy()
    inside = found != OUTLIER
    table = contingency(found[inside], pids[inside])
    same = _pairs(table.data)
    most_frequent = table.max(axis=1).toarray().sum() if table.nnz else 0.0
    clusters = np.bincount(found[inside]) if table.nnz else np.zeros(0)
    identities = np.unique(pids, return_counts=True)[1]
    return {
        "purity": _share(most_frequent, inside.sum()),
        "ami": adjusted_mutual_info(outliers_alone(found), pids) if len(pids) else math.nan,
        "pair_precision": _share(same, _pairs(clusters)),
        "pair_recall": _share(same, _pairs(identities)),
    }


def _pairs(counts: NDArray[np.floating[Any]] | NDArray[np.integer[Any]]) -> float:
    """Number of pairs within groups of these sizes."""
    sizes = counts.astype(np.float64)
    return float((sizes * (sizes - 1)).sum() / 2)


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan
