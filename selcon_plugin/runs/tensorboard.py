"""Visualization in TensorBoard: contact sheet of clusters and embedding projector.

Shape shorthand in this module:

    M: images
    C: feature dimension
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from selcon_plugin.clustering import OUTLIER
from selcon_plugin.runs.sheets import SheetRow, draw_sheet, thumbnail

logger = logging.getLogger(__name__)

# These limits keep the files below a few MB.
_MAX_POINTS = 1000
_MAX_DIMENSIONS = 64
_SPRITE = (32, 64)  # width, height
_SHEET_CLUSTERS, _SHEET_IMAGES = 8, 8
_SHEET_CELL = (64, 128)


def cluster_sheet(paths: Sequence[str], features: Tensor, labels: Tensor) -> Image.Image:
    """Render a contact sheet of the largest clusters, one per row.

    The images in a row are sorted by decreasing similarity to the mean of the cluster.

    Args:
        paths: Paths of the M images.
        features: L2-normalized features, ``(M, C)``.
        labels: Cluster of each image, int64 ``(M,)``, -1 for an outlier.

    Returns:
        At most 8 rows of at most 8 images, evenly spaced over each cluster.

    Raises:
        ValueError: If there is no cluster.
    """  # noqa: DOC502  (raised by what this calls)
    rows = []
    sizes = torch.bincount(labels[labels != OUTLIER])
    for cluster in sizes.argsort(descending=True, stable=True)[:_SHEET_CLUSTERS].tolist():
        members = (labels == cluster).nonzero().flatten()
        own = features[members]
        order = (own @ own.mean(dim=0)).argsort(descending=True, stable=True)
        title = f"cluster {cluster}: {len(members)} images"
        rows.append(SheetRow(title, [paths[i] for i in members[order].tolist()]))
    return draw_sheet(rows, columns=_SHEET_IMAGES, image_size=_SHEET_CELL)


def chosen_points(labels: Tensor, limit: int = _MAX_POINTS) -> Tensor:
    """Select the images for the projector: whole clusters first, by decreasing size.

    Args:
        labels: Cluster of each image, int64 ``(M,)``, -1 for an outlier.
        limit: Largest number of images.

    Returns:
        Image indices in ascending order. Remaining places are filled with evenly spaced
        outliers.
    """
    sizes = torch.bincount(labels[labels != OUTLIER], minlength=1)
    size = torch.where(labels == OUTLIER, 0, sizes[labels.clamp(min=0)])
    inside = (-size).argsort(stable=True)[: int((labels != OUTLIER).sum())][:limit]
    outliers = (labels == OUTLIER).nonzero().flatten()
    num_outliers = min(limit - len(inside), len(outliers))
    spread = np.linspace(0, max(0, len(outliers) - 1), num_outliers).round().astype(int)
    return torch.cat([inside, outliers[spread]]).sort().values


def reduced(features: Tensor, dimensions: int = _MAX_DIMENSIONS) -> Tensor:
    """Project features onto their principal axes to keep the projector's file small.

    Args:
        features: Shape ``(M, C)``.
        dimensions: Largest number of axes.

    Returns:
        Centered projections, shape ``(M, min(C, M, dimensions))``: the best approximation
        of the features with that many axes.
    """
    centered = features.double() - features.double().mean(dim=0)
    _, _, axes = torch.linalg.svd(centered, full_matrices=False)
    projected: Tensor = centered @ axes[:dimensions].T
    return projected.float()


def write_pictures(
    folder: str | Path,
    paths: Sequence[str],
    camids: Sequence[int],
    features: Tensor,
    labels: Tensor,
    *,
    step: int,
) -> None:
    """Write a contact sheet of clusters and the embedding to a run's TensorBoard files.

    The embedding contains at most 1,000 images, with 64 principal axes, cluster, camera,
    file name and a small crop. A failure to write causes only a warning, so that the run
    continues.

    Args:
        folder: Folder of the run.
        paths: Paths of the M images.
        camids: Camera of each image, -1 where unknown.
        features: L2-normalized features, ``(M, C)``.
        labels: Cluster of each image, int64 ``(M,)``, -1 for an outlier.
        step: Number of completed optimizer steps.
    """
    features, labels = features.detach().float().cpu(), labels.cpu()
    points = chosen_points(labels)
    try:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder)) as writer:
            if bool((labels != OUTLIER).any()):
                sheet = np.asarray(cluster_sheet(paths, features, labels))
                writer.add_image("largest_clusters", sheet, step, dataformats="HWC")
            writer.add_embedding(
                reduced(features[points]),
                metadata=[
                    [_cluster_name(labels[i]), camids[i], Path(paths[i]).name]
                    for i in points.tolist()
                ],
                metadata_header=["cluster", "camera", "file"],
                label_img=_sprites([paths[i] for i in points.tolist()]),
                global_step=step,
                tag="training_images",
            )
    except (OSError, ImportError) as error:
        logger.warning("Contact sheet and embedding not written to TensorBoard: %s", error)
        return
    logger.info("Contact sheet and embedding written to TensorBoard in %s", folder)


def _cluster_name(label: Tensor) -> str:
    return "none" if label == OUTLIER else str(int(label))


def _sprites(paths: Sequence[str]) -> Tensor:
    """Return square crops for the projector, ``(N, 3, side, side)`` in 0..1."""
    side = max(_SPRITE)
    sprites = np.full((len(paths), side, side, 3), 255, dtype=np.uint8)
    left = (side - _SPRITE[0]) // 2
    for sprite, path in zip(sprites, paths, strict=True):
        crop: NDArray[np.uint8] = np.asarray(thumbnail(path, _SPRITE))
        sprite[:, left : left + _SPRITE[0]] = crop
    return torch.from_numpy(sprites).permute(0, 3, 1, 2).float() / 255.0
