"""OutlierAware: Cluster Contrast with a memory slot for every outlier.

"Discriminatively Unsupervised Learning Person Re-Identification via Considering Complicated
Images", Sensors 23(6), 3259, 2023. https://doi.org/10.3390/s23063259

Reconstructed from the abstract: the memory dictionary holds clustered and unclustered
images, and one loss is computed over both.
"""

from __future__ import annotations

from selcon_plugin.methods.base import register_method
from selcon_plugin.methods.cluster_contrast import ClusterContrast


@register_method("OutlierAware")
class OutlierAware(ClusterContrast):
    """One dictionary of clusters and outliers.

    The memory has one row per cluster, its mean, and after these one row per outlier, its
    own feature. Every image is contrasted with all rows; the target of an outlier is its
    own row, which it alone writes. Without outliers this is :class:`ClusterContrast`.

    A cluster's image meets the outliers as negatives in any case; that outliers are trained
    as well takes a share of the batch (``MODEL.SELCON.OUTLIER_RATIO``), since one image
    cannot fill its part of a P x K batch.

    The options are those of :class:`ClusterContrast`.
    """

    outliers_are_classes = True
