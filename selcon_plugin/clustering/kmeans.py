"""k-means on unit features, for data with a roughly known number of persons.

The number of clusters is an option, every image gets a cluster, and no distances between
images are needed, so the cost stays low on large data sets. 3C uses 750 clusters on
Market-1501 (and 1,000 on MSMT17 and VeRi-776).

faiss runs the iterations if it is installed, on the GPU if the features are there and faiss
supports it (Johnson et al., "Billion-scale similarity search with GPUs", 2017); otherwise
scikit-learn does. Both start from the same centers, sampled by greedy k-means++ (Arthur and
Vassilvitskii, SODA 2007): on features of hundreds of persons, faiss' own random
initialization ends in clearly worse clusters.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from selcon_plugin.clustering.base import Labeler, register_labeler
from selcon_plugin.clustering.copies import copy_groups
from selcon_plugin.clustering.pseudo_labels import PseudoLabels
from selcon_plugin.options import Interval

logger = logging.getLogger(__name__)

_SEED = 0
_ITERATIONS = 25  # faiss' default; few images still change cluster after that
# The initialization reads all its images once per cluster: larger sets are subsampled.
_START_IMAGES_PER_CLUSTER = 20


def _start_centers(features: NDArray[np.float32], num_clusters: int) -> Any:
    sample = features
    limit = _START_IMAGES_PER_CLUSTER * num_clusters
    if len(features) > limit:
        rng = np.random.default_rng(_SEED)
        sample = features[rng.choice(len(features), limit, replace=False)]
    return kmeans_plusplus(sample, num_clusters, random_state=_SEED)[0]


def _faiss_labels(
    features: NDArray[np.float32], centers: NDArray[np.float32], *, gpu: bool
) -> Any:
    faiss = importlib.import_module("faiss")
    model = faiss.Kmeans(
        features.shape[1],
        len(centers),
        niter=_ITERATIONS,
        seed=_SEED,
        spherical=True,
        gpu=gpu and faiss.get_num_gpus() > 0,
        # Small clusters are intended, and every image is used.
        min_points_per_centroid=1,
        max_points_per_centroid=len(features),
    )
    model.train(features, init_centroids=centers)
    return model.assign(features)[1]


def _sklearn_labels(features: NDArray[np.float32], centers: NDArray[np.float32]) -> Any:
    model = KMeans(len(centers), init=centers, n_init=1, max_iter=_ITERATIONS)
    with warnings.catch_warnings():
        # With fewer distinct images than clusters some stay empty, which is allowed here.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(features).labels_


@register_labeler("KMeans")
class KMeansLabeler(Labeler):
    """Spherical k-means by faiss, or k-means by scikit-learn.

    faiss L2-normalizes the centers after each iteration and scikit-learn does not, so their
    clusters differ slightly. Both are seeded: equal features on the same machine give equal
    labels. Empty clusters are dropped; there are no outliers.

    Args:
        num_clusters: Number of clusters; clamped, with a warning, to the number of
            different images.
    """

    def __init__(self, *, num_clusters: Annotated[int, Interval(1)] = 750) -> None:
        self.num_clusters = num_clusters

    def cluster(self, features: Tensor) -> PseudoLabels:
        """Run k-means.

        Args:
            features: Unit vectors ``(M, C)``.

        Returns:
            The labels, without distances.
        """
        array = np.ascontiguousarray(features.detach().cpu().numpy(), dtype=np.float32)
        first, number = np.unique(copy_groups(features), return_inverse=True)
        if len(first) >= self.num_clusters:  # copies have the same nearest center
            first = number = np.arange(len(features))
        else:
            logger.warning(
                "%d images cannot form %d clusters (num_clusters): using %d clusters%s",
                len(first),
                self.num_clusters,
                len(first),
                ", as copies count once" if len(first) < len(features) else "",
            )
        array = array[first]
        num_clusters = min(self.num_clusters, len(first))
        if not num_clusters:
            return PseudoLabels.numbered([])
        centers = _start_centers(array, num_clusters)
        if importlib.util.find_spec("faiss") is not None:
            labels = _faiss_labels(array, centers, gpu=features.is_cuda)
        else:
            labels = _sklearn_labels(array, centers)
        return PseudoLabels.numbered(np.asarray(labels)[number])
