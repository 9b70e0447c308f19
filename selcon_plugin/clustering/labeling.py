"""Clustering for one training epoch, with a fallback if the clusters are unusable."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from selcon_plugin.clustering.base import Labeler
from selcon_plugin.clustering.pseudo_labels import PseudoLabels
from selcon_plugin.clustering.quality import label_stability
from selcon_plugin.clustering.remedies import fewer_outliers, more_clusters
from selcon_plugin.distributed import broadcast_tensor, world_size
from selcon_plugin.options import options_of

logger = logging.getLogger(__name__)


def label_images(
    labeler: Labeler,
    features: Tensor,
    camids: Tensor | None,
    *,
    min_clusters: int = 2,
    previous: Tensor | None = None,
) -> PseudoLabels:
    """Cluster the training images, or fall back to instance-level labels.

    Few clusters are common in the first epochs of a run, and a badly chosen eps may give
    none or only one. A cluster-based method cannot be trained on them; for such an epoch
    every image is its own class, which needs no clusters and updates the features for the
    next clustering.

    Args:
        labeler: Labeler that clusters the features.
        features: Features of images 0..M-1, shape ``(M, C)``.
        camids: Camera of each image, int64 ``(M,)``, -1 where unknown, or None.
        min_clusters: Number of clusters that a batch needs.
        previous: Labels of the previous round, int64 ``(M,)``, for the stability metric.

    Returns:
        Labels with at least ``min_clusters`` clusters, or instance-level labels.
    """
    found = labeler(features, camids)
    measured = dict(found.measured)
    if previous is not None:
        measured["stability"] = label_stability(found.labels, previous.cpu())
    if found.num_clusters >= max(2, min_clusters):
        return dataclasses.replace(found, measured=measured)
    logger.warning(
        "%s, but a batch needs %d: in this epoch every image is its own class. %s",
        _summary(found),
        max(2, min_clusters),
        _remedy(found, labeler),
    )
    return PseudoLabels.each_its_own(
        found.num_images, distance=found.distance, measured=measured
    )


def _summary(found: PseudoLabels) -> str:
    clusters = {0: "No cluster was", 1: "One cluster was"}.get(
        found.num_clusters, f"{found.num_clusters} clusters were"
    )
    percent = 100.0 * found.outlier_ratio
    return f"{clusters} found ({percent:.0f} % of {found.num_images} images are outliers)"


def _remedy(found: PseudoLabels, labeler: Labeler) -> str:
    options = options_of(type(labeler))
    if found.outlier_ratio > 0.5:
        return f"If this persists, {fewer_outliers(options)}"
    if found.num_clusters == 1:
        return f"If this persists, {more_clusters(options)}"
    return "If this persists, lower the batch size or raise the images per cluster in it"


def share_pseudo_labels(
    pseudo_labels: PseudoLabels | None, device: torch.device
) -> PseudoLabels:
    """Broadcast the labels of rank 0 to all ranks.

    Args:
        pseudo_labels: The labels on rank 0, None on other ranks.
        device: Device of the process group's tensors.

    Returns:
        The same labels, distances and ``labelings`` on every rank; ``measured`` is only on
        rank 0.
    """
    if world_size() == 1:
        assert pseudo_labels is not None
        return pseudo_labels
    arrays: list[Tensor | None] = [None] * 6
    if pseudo_labels is not None:
        graph, labelings = pseudo_labels.distance, pseudo_labels.labelings
        num_labelings = 0 if labelings is None else len(labelings)
        flags = [pseudo_labels.instance_level, graph is not None, num_labelings]
        arrays[:2] = [torch.tensor(flags, dtype=torch.int64), pseudo_labels.labels]
        if labelings is not None:
            arrays[2] = labelings.flatten()
        if graph is not None:
            indptr, indices = (a.astype(np.int64) for a in (graph.indptr, graph.indices))
            arrays[3:] = [torch.from_numpy(a) for a in (indptr, indices, graph.data)]
    flags_, labels, flat = (broadcast_tensor(a, torch.int64, device) for a in arrays[:3])
    graph = None
    if flags_[1]:
        indptr_, indices_ = (broadcast_tensor(a, torch.int64, device) for a in arrays[3:5])
        data = broadcast_tensor(arrays[5], torch.float32, device)
        parts = (data.numpy(), indices_.numpy(), indptr_.numpy())
        graph = csr_array(parts, shape=(len(labels), len(labels)))
    if pseudo_labels is not None:
        return pseudo_labels
    return PseudoLabels(
        labels,
        distance=graph,
        instance_level=bool(flags_[0]),
        labelings=flat.view(int(flags_[2]), -1) if flags_[2] else None,
    )


def nearest_by_distance(pseudo_labels: PseudoLabels, count: int) -> tuple[Tensor, Tensor]:
    """Return the nearest other images of each image by the stored sparse distances.

    Args:
        pseudo_labels: Labels with a ``distance``.
        count: Number of neighbors L, at least 1.

    Returns:
        ``index`` int64 and ``distance`` float32, both ``(M, L)``, nearest first, on the
        CPU. If an image has fewer stored distances, its row is padded with its own index at
        distance 1.

    Raises:
        ValueError: If the labels carry no distance.
    """
    graph = pseudo_labels.distance
    if graph is None:
        raise ValueError(
            "the labels carry no distances between images: choose a labeler that uses the "
            "Jaccard distance, such as DBSCAN"
        )
    rows = pseudo_labels.num_images
    own = torch.arange(rows)
    columns = torch.from_numpy(graph.indices).long()
    row = torch.repeat_interleave(own, torch.from_numpy(graph.indptr).long().diff())
    distance = torch.from_numpy(graph.data).float()
    others = row != columns
    row, columns, distance = row[others], columns[others], distance[others]
    # Sorted by row, distance and column: stored columns ascend and both sorts are stable.
    order = torch.argsort(distance, stable=True)
    order = order[torch.argsort(row[order], stable=True)]
    row, columns, distance = row[order], columns[order], distance[order]
    counts = torch.bincount(row, minlength=rows)
    place = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
    kept = place < count
    index = own[:, None].repeat(1, count)
    nearest = torch.ones(rows, count)
    index[row[kept], place[kept]] = columns[kept]
    nearest[row[kept], place[kept]] = distance[kept]
    return index, nearest
