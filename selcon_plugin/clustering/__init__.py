"""Clustering of the training images by their features, without identity labels."""

import importlib
import pkgutil

from selcon_plugin.clustering.agglomerative import AgglomerativeLabeler
from selcon_plugin.clustering.auto_eps import choose_eps
from selcon_plugin.clustering.base import (
    Labeler,
    LabelFilter,
    build_labeler,
    labeler_class,
    labeler_names,
    labeler_options,
    register_labeler,
)
from selcon_plugin.clustering.dbscan import DBSCANLabeler, dbscan_labels
from selcon_plugin.clustering.ensemble import (
    EnsembleLabeler,
    cluster_agreement,
    co_association,
)
from selcon_plugin.clustering.filters import (
    OutlierPolicy,
    ReliabilityFilter,
    SingleCameraFilter,
)
from selcon_plugin.clustering.hdbscan import HDBSCANLabeler
from selcon_plugin.clustering.infomap import InfomapLabeler
from selcon_plugin.clustering.jaccard import jaccard_distance
from selcon_plugin.clustering.kmeans import KMeansLabeler
from selcon_plugin.clustering.knn import nearest_neighbors
from selcon_plugin.clustering.labeling import (
    label_images,
    nearest_by_distance,
    share_pseudo_labels,
)
from selcon_plugin.clustering.neighbors import Neighbors
from selcon_plugin.clustering.pseudo_labels import OUTLIER, PseudoLabels
from selcon_plugin.clustering.quality import cluster_quality, label_stability

# Importing a labeler's module registers it, so a new labeler changes no other file.
for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):  # kernels need numba, which may be missing
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "OUTLIER",
    "AgglomerativeLabeler",
    "DBSCANLabeler",
    "EnsembleLabeler",
    "HDBSCANLabeler",
    "InfomapLabeler",
    "KMeansLabeler",
    "LabelFilter",
    "Labeler",
    "Neighbors",
    "OutlierPolicy",
    "PseudoLabels",
    "ReliabilityFilter",
    "SingleCameraFilter",
    "build_labeler",
    "choose_eps",
    "cluster_agreement",
    "cluster_quality",
    "co_association",
    "dbscan_labels",
    "jaccard_distance",
    "label_images",
    "label_stability",
    "labeler_class",
    "labeler_names",
    "labeler_options",
    "nearest_by_distance",
    "nearest_neighbors",
    "register_labeler",
    "share_pseudo_labels",
]
