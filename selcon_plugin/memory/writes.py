"""Momentum updates of a memory bank's rows in sequence, and cluster means."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def run_starts(ordered: Tensor) -> Tensor:
    """Return which entries of a sorted ``(T,)`` start a run of equal ones."""
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    return starts


def _write_rounds(rows: Tensor) -> list[Tensor]:
    """Split an ordered list of writes into rounds in which no row occurs twice.

    Round r contains the r-th write of every row, so that the writes of one row keep their
    order.

    Args:
        rows: Written row of each write, in order, shape ``(T,)``.

    Returns:
        Positions into ``rows``, one tensor per round.
    """
    order = torch.argsort(rows, stable=True)
    ordered = rows[order]
    position = torch.arange(len(rows), device=rows.device)
    # Position of the first write of the same row, carried forward.
    first = torch.where(run_starts(ordered), position, 0).cummax(dim=0).values
    occurrence = position - first
    by_round = torch.argsort(occurrence, stable=True)
    sizes: list[int] = torch.bincount(occurrence).tolist()  # the only synchronization
    return list(torch.split(order[by_round], sizes))


@torch.no_grad()
def write_rows(
    bank: Tensor, rows: Tensor, features: Tensor, source: Tensor, *, momentum: float
) -> None:
    """Move bank rows towards features, one write after the other.

    Write t sets ``bank[r] ← normalize(momentum · bank[r] + (1 - momentum) · f)`` with
    ``r = rows[t]`` and ``f = features[source[t]]``. A row that occurs several times is
    written several times, in the given order. The result equals a Python loop over the
    writes, but the number of rounds is only the number of writes to the most frequent row.

    Args:
        bank: Bank, written in place, shape ``(M, ..., C)``; vectors lie along the last
            axis.
        rows: Row of each write, int64, shape ``(T,)``.
        features: Shape ``(number of features, ..., C)``.
        source: Feature of each write, int64, shape ``(T,)``.
        momentum: Weight of the old row, in [0, 1].
    """
    if not len(rows):
        return
    for positions in _write_rounds(rows):
        targets = rows[positions]
        new = features[source[positions]].float()
        mixed = torch.lerp(new, bank[targets].float(), momentum)
        bank[targets] = F.normalize(mixed, dim=-1).to(bank.dtype)


def sum_rows(features: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Add up the features of each row, always in the same order.

    Args:
        features: Shape ``(T, C)``.
        rows: Row of each feature, int64, shape ``(T,)``.
        num_rows: Rows of the result.

    Returns:
        Float32 sums, shape ``(num_rows, C)``.
    """
    features = features.float()
    sums = features.new_zeros(num_rows, features.shape[1])
    if features.is_cuda:
        # On a GPU index_add_ would add in any order, and banks that must be equal on every
        # process would differ in the last bits. index_put_ sorts.
        return sums.index_put_((rows,), features, accumulate=True)
    return sums.index_add_(0, rows, features)


@torch.no_grad()
def cluster_means(
    features: Tensor,
    labels: Tensor,
    *,
    num_clusters: int | None = None,
    normalize: bool = True,
) -> Tensor:
    """Average the features of each cluster, by default scaled to unit length.

    Args:
        features: Unit vectors of all images, shape ``(M, C)``.
        labels: Cluster of each image, int64, shape ``(M,)``, on any device; -1 for an
            outlier, which is left out.
        num_clusters: Number of clusters, if it is known; otherwise it is read from the
            labels, which makes the caller wait for a GPU.
        normalize: Whether the means are scaled to unit length.

    Returns:
        Float32 means, shape ``(num_clusters, C)``, on the device of ``features``; a cluster
        without images has a zero row.

    Raises:
        ValueError: If there is not one label for each feature.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> cluster_means(features, torch.tensor([0, 1, -1])).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    if labels.shape != features.shape[:1]:
        raise ValueError(
            f"labels must hold one label for each of the {len(features)} features, got "
            f"shape {tuple(labels.shape)}"
        )
    if num_clusters is None:
        num_clusters = int(labels.max()) + 1 if len(labels) else 0
    # Outliers go to an extra row, which is cut off: this avoids a copy of the features.
    rows = torch.where(labels < 0, num_clusters, labels).to(features.device)
    sums = sum_rows(features, rows, num_clusters + 1)[:num_clusters]
    if normalize:
        return F.normalize(sums, dim=1)
    counts = sums.new_zeros(num_clusters + 1).index_add_(0, rows, sums.new_ones(len(rows)))
    return sums / counts[:num_clusters, None].clamp(min=1)
