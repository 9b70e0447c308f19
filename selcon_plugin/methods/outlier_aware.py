"""OutlierAware: Cluster Contrast with a memory row for every outlier.

"Discriminatively Unsupervised Learning Person Re-Identification via Considering Complicated
Images", Sensors 23(6), 3259, 2023. https://doi.org/10.3390/s23063259

The method is reconstructed from the abstract: the memory dictionary contains clustered and
unclustered images, and one loss is computed over both.
"""

from __future__ import annotations

from selcon_plugin.methods.base import register_method
from selcon_plugin.methods.cluster_contrast import ClusterContrast


@register_method("OutlierAware")
class OutlierAware(ClusterContrast):
    """Cluster Contrast with one dictionary of clusters and outliers.

    The memory has one row per cluster, its mean, followed by one row per outlier, its own
    feature. Every image is contrasted with all rows; the target of an outlier is its own
    row, which no other image writes. Without outliers this is :class:`ClusterContrast`.

    The outliers are always negatives of clustered images. To train the outliers as well,
    reserve a fraction of the batch for them (``MODEL.SELCON.OUTLIER_RATIO``), because one
    image cannot fill its part of a P x K batch.

    The options are those of :class:`ClusterContrast`.
    """

    outliers_are_classes = True
