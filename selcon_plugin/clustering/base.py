"""Base class and registry of labelers, which turn features into pseudo-labels."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selcon_plugin.clustering.auto_threshold import mean_silhouette
from selcon_plugin.clustering.camera_centering import center_cameras
from selcon_plugin.clustering.copies import copy_groups, unite_copies
from selcon_plugin.clustering.jaccard import unit_features
from selcon_plugin.clustering.multi_scale import without_mean
from selcon_plugin.clustering.neighborhood import MOST_NEIGHBORS
from selcon_plugin.clustering.pseudo_labels import PseudoLabels, outliers_as_singletons
from selcon_plugin.clustering.quality import cluster_quality
from selcon_plugin.options import Option, check_options, options_of
from selcon_plugin.registry import Registry

logger = logging.getLogger(__name__)

# Options that count images.
_NEIGHBORHOODS, _CLUSTER_SIZES = ("k1", "k2", "k"), ("min_samples", "min_cluster_size")

_LABELERS: Registry[type[Labeler]] = Registry("labeler")
LabelerClass = TypeVar("LabelerClass", bound="type[Labeler]")


class LabelFilter(Protocol):
    """Correction of pseudo-labels after clustering; filters run in sequence."""

    def __call__(
        self,
        pseudo_labels: PseudoLabels,
        features: Tensor,
        camids: Tensor | None,
        labeler: Labeler,
    ) -> PseudoLabels:
        """Correct pseudo-labels.

        Args:
            pseudo_labels: Output of the labeler or of the previous filter.
            features: L2-normalized features, float32 ``(M, C)``, on any device.
            camids: Camera of each image, int64 ``(M,)`` on the CPU, or None.
            labeler: Labeler that produced the pseudo-labels.

        Returns:
            Corrected labels; ``distance``, ``labelings`` and ``measured`` are kept.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the filter keeps between epochs."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state returned by :meth:`state_dict`."""


class Labeler(ABC):
    """Base class of all labelers; a labeler sees features, never ground-truth identities.

    The options are the constructor's keyword-only arguments, as for methods.

    Attributes:
        center_cameras: Whether features are first centered per camera, where cameras are
            known.
        filters: Filters applied to the labels, in this order.
    """

    center_cameras: bool = False
    filters: Sequence[LabelFilter] = ()

    @abstractmethod
    def cluster(self, features: Tensor) -> PseudoLabels:
        """Cluster images by their features; only centering and filters use cameras.

        Args:
            features: Finite unit vectors, float32 ``(M, C)``, on any device; M may be 0.

        Returns:
            The labels, with the sparse distances if the labeler computes them.
        """

    def cluster_seen(self, features: Tensor, camids: Tensor | None) -> PseudoLabels:
        """Cluster images whose cameras may be known; by default they are not used.

        Args:
            features: As for :meth:`cluster`.
            camids: Camera of each image, int64 ``(M,)`` on the CPU, -1 where unknown, or
                None.

        Returns:
            As :meth:`cluster`.
        """
        return self.cluster(features)

    def num_neighbors(self, num_images: int) -> int:
        """Return the number of neighbors searched per image, for cost estimates.

        Args:
            num_images: Number of images M.

        Returns:
            The option k1 or k, or its largest "auto" value; 0 for a labeler that has
            neither.
        """
        found: int | str = getattr(self, "k1", getattr(self, "k", 0))
        return MOST_NEIGHBORS if isinstance(found, str) else found

    def smallest_cluster(self, found: PseudoLabels) -> int:
        """Return the number of copies of one image that are a cluster of their own.

        Args:
            found: Output of :meth:`cluster`.

        Returns:
            The option min_cluster_size or min_samples; 2 for a labeler that has neither.
        """
        size: int = getattr(self, "min_cluster_size", getattr(self, "min_samples", 2))
        return max(2, size)

    def check_counts(
        self, num_images: int, key: Callable[[str], str] = str, *, warn: bool = True
    ) -> None:
        """Check that no neighborhood and no cluster has more images than there are.

        Larger neighborhoods hold all images, with a warning; larger clusters cannot exist.
        Defaults, which nobody has chosen, are accepted.

        Args:
            num_images: Number of images M.
            key: Returns the name of an option for the message.
            warn: Whether to warn of large neighborhoods.

        Raises:
            ValueError: If a cluster, or a core image, needs more than M images.
        """
        for name, option in options_of(type(self)).items():
            value = getattr(self, name, option.default)
            if value in (option.default, *option.special_values):
                continue
            if name in _CLUSTER_SIZES and value > num_images:
                raise ValueError(
                    f"{key(name)} is {value}, but there are {num_images} images, so no "
                    f"cluster can be found: use at most {num_images}"
                )
            if warn and name in _NEIGHBORHOODS and value > num_images:
                logger.warning(
                    "%s is %d, but there are %d images, all of which are neighbors of each "
                    "other then: use much less than %d",
                    key(name),
                    value,
                    num_images,
                    num_images,
                )

    def check_reach(self, eps_change: float) -> None:
        """Refuse a change of eps that :meth:`labels_at` cannot follow.

        Args:
            eps_change: Largest change that will be requested.

        Raises:
            ValueError: If the change is too large, or the labeler has no eps.
        """
        if type(self).labels_at is Labeler.labels_at:
            raise ValueError(
                f"{type(self).__name__} has no eps to change: use the DBSCAN labeler, or "
                "remove the filter that needs it (ReliabilityFilter, RELIABILITY)"
            )

    def labels_at(self, pseudo_labels: PseudoLabels, eps_change: float) -> Tensor:
        """Cluster the same distances with a different eps and return int64 ``(M,)``.

        Args:
            pseudo_labels: Output of :meth:`cluster`.
            eps_change: Value added to the eps of that output.

        Raises:
            NotImplementedError: In this base class; see :meth:`check_reach`.
        """
        self.check_reach(eps_change)
        raise NotImplementedError

    @torch.no_grad()
    def __call__(
        self, features: Tensor | NDArray[np.floating[Any]], camids: Tensor | None = None
    ) -> PseudoLabels:
        """Cluster the images, filter the labels, measure their quality and log it.

        Images with equal features, such as copies of a file, get the same label.

        Args:
            features: Features of images 0..M-1, shape ``(M, C)``, on any device; they are
                L2-normalized here.
            camids: Camera of each image, int64 ``(M,)``, -1 where unknown, or None.

        Returns:
            The labels, with the sparse distances if the labeler computes them;
            ``measured`` also holds the label-free quality of the filtered labels.
        """
        started = time.perf_counter()
        features = torch.as_tensor(features)
        features = unit_features(features.to(clustering_device(features.device)))
        camids = _checked_camids(camids, len(features))
        if self.center_cameras and camids is not None:
            features = center_cameras(features, camids)
        found = self.cluster_seen(features, camids)
        labels = unite_copies(
            found.labels.numpy(),
            copy_groups(features),
            self.smallest_cluster(found),
        )
        found = replace(found, labels=PseudoLabels.numbered(labels).labels)
        for label_filter in self.filters:
            found = label_filter(found, features, camids, self)
        silhouette = mean_silhouette(
            without_mean(features), outliers_as_singletons(found.labels.numpy())
        )
        measured = {**found.measured, **cluster_quality(found)}
        found = replace(found, measured={**measured, "cosine_silhouette": silhouette})
        sizes = found.sizes
        logger.info(
            "%s: %d clusters of %d to %d images, %d outliers among %d images, %.1f s",
            type(self).__name__,
            found.num_clusters,
            int(sizes.min()) if len(sizes) else 0,
            int(sizes.max()) if len(sizes) else 0,
            found.num_outliers,
            found.num_images,
            time.perf_counter() - started,
        )
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the filters keep between epochs."""
        return {str(i): f.state_dict() for i, f in enumerate(self.filters)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state returned by :meth:`state_dict`."""
        for i, label_filter in enumerate(self.filters):
            label_filter.load_state_dict(state.get(str(i), {}))


def clustering_device(device: torch.device) -> torch.device:
    """Return the device that clusters features of a device: the CPU for Apple's GPU.

    Apple's GPU (mps) has neither float64 nor the sparse products of the Jaccard distance.

    Args:
        device: Device of the features.
    """
    return torch.device("cpu") if device.type == "mps" else device


def _checked_camids(camids: Tensor | None, num_images: int) -> Tensor | None:
    if camids is None:
        return None
    camids = torch.as_tensor(camids).to(device="cpu", dtype=torch.int64)
    if camids.shape != (num_images,):
        raise ValueError(
            f"camids must hold one camera per image, shape ({num_images},), got shape "
            f"{tuple(camids.shape)}"
        )
    return camids


def register_labeler(name: str) -> Callable[[LabelerClass], LabelerClass]:
    """Return a class decorator that registers a labeler for :func:`build_labeler`."""
    return _LABELERS.register(name)


def labeler_names() -> list[str]:
    """Return the names of all registered labelers."""
    return _LABELERS.names()


def labeler_class(name: str) -> type[Labeler]:
    """Return the class registered under ``name``."""
    return _LABELERS[name]


def labeler_options(name: str) -> dict[str, Option]:
    """Return the options of the labeler registered under ``name``."""
    return options_of(labeler_class(name))


def build_labeler(
    name: str,
    *,
    center_cameras: bool = False,
    filters: Sequence[LabelFilter] = (),
    **options: Any,
) -> Labeler:
    """Build a labeler by name and check its options.

    Args:
        name: Registered name, for instance ``"DBSCAN"``.
        center_cameras: Whether features are first centered per camera.
        filters: Filters applied to the labels, in this order.
        **options: The labeler's keyword options; omitted ones keep their defaults.

    Returns:
        The labeler.
    """
    checked = check_options(labeler_options(name), options, owner=name)
    labeler = labeler_class(name)(**checked)
    labeler.center_cameras = center_cameras
    labeler.filters = tuple(filters)
    return labeler
