"""Label-free criterion of how well features discriminate persons.

It serves model selection between networks on the same images, or epochs of one run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selcon_plugin.clustering.auto_threshold import (
    chosen_threshold,
    images_for,
    mean_silhouette,
)
from selcon_plugin.clustering.camera_centering import center_cameras
from selcon_plugin.clustering.jaccard import unit_features
from selcon_plugin.clustering.linkage import average_linkage
from selcon_plugin.clustering.multi_scale import multi_scale_distance, without_mean
from selcon_plugin.metrics.collapse import find_collapse_signs, measure_spread

__all__ = ["LabelFreeQuality", "label_free_quality"]


@dataclass(frozen=True)
class LabelFreeQuality:
    """Label-free quality of features, measured by clustering them.

    Attributes:
        value: Mean silhouette by the cosine distance, in 0..1; a cluster of one image
            counts as 0. 0 if the features have collapsed, or nearly all images are one
            cluster.
        threshold: Threshold of average linkage.
        images_per_person: Number of images per person that belongs to this threshold.
        num_clusters: Number of clusters of at least two images.
        outlier_ratio: Fraction of the images in no such cluster.
        collapse: Description of signs of collapsed features, whose clusters are
            meaningless; see :mod:`selcon_plugin.metrics.collapse`.
    """

    value: float
    threshold: float
    images_per_person: float
    num_clusters: int
    outlier_ratio: float
    collapse: str = ""


@torch.no_grad()
def label_free_quality(
    features: Tensor | NDArray[np.floating[Any]],
    camids: Tensor | NDArray[np.int64] | None = None,
    *,
    images_per_person: float | None = None,
) -> LabelFreeQuality:
    """Measure how well features form clusters; larger is better.

    The images are clustered as ``selcon cluster`` does. The criterion is the mean
    silhouette of these clusters by the cosine distance, after the mean of all features is
    subtracted: with a the mean distance to the other images of the own cluster and b the
    smallest mean distance to another cluster, the mean of (b - a) / max(a, b). Only results
    for the same images are comparable. How often it orders networks rightly is measured in
    docs/benchmarks/folders.md.

    Args:
        features: Features of images 0..M-1, shape ``(M, C)``, on any device; L2-normalized
            here.
        camids: Camera of each image, -1 if unknown, ``(M,)``, for per-camera centering;
            None to ignore cameras.
        images_per_person: About how many images show the same person; None to estimate it.

    Returns:
        The criterion, and what the clusters are.

    Raises:
        ValueError: If the features are not a finite matrix.
    """  # noqa: DOC502  (raised by a function called here)
    features = unit_features(features)
    collapse = ""
    if len(features) > 1:
        collapse = str(find_collapse_signs(measure_spread(features), len(features)))
    cameras = None if camids is None else torch.as_tensor(camids)
    if cameras is not None:
        features = center_cameras(features, cameras)
    hierarchy = average_linkage(multi_scale_distance(features))
    hint = "auto" if images_per_person is None else images_per_person
    threshold = chosen_threshold(hierarchy, features, cameras, images_per_person=hint)
    labels = hierarchy.cut(threshold)
    sizes = np.bincount(labels, minlength=1)
    value = max(0.0, mean_silhouette(without_mean(features), labels))
    return LabelFreeQuality(
        0.0 if collapse else value,
        threshold,
        images_for(threshold),
        int((sizes > 1).sum()),
        float((sizes == 1).sum() / max(1, len(labels))),
        collapse,
    )
