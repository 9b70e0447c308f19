"""Camera proxies: the images that one camera has of one cluster, and a memory row for each.

A person looks different in every camera. Methods with camera proxies split each cluster by
camera and store one vector per camera and cluster, so that a row is not an average over
cameras.

The images of unknown camera form one proxy of their cluster, whose camera is unknown. It
may contain images of several cameras: nothing is learned *within* that camera, but it is a
proxy of its cluster like the others.

Shape shorthand in this module:

    B: images in the batch; b: those of this process
    M: training images
    P: camera proxies
    C: feature dimension
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from selcon_plugin.memory.cluster import ClusterMemory
from selcon_plugin.memory.writes import cluster_means

_UNKNOWN = -1
_OUTLIER = -1


class CameraProxies(NamedTuple):
    """Assignment of images to camera proxies.

    Attributes:
        proxies: Proxy of each image, int64 ``(M,)``; -1 for an outlier.
        clusters: Cluster of each proxy, int64 ``(P,)``, ascending.
        cameras: Camera of each proxy, int64 ``(P,)``: the cameras of clustered images,
            numbered 0, 1, ... in the order of their ids; -1 for unknown.
    """

    proxies: Tensor
    clusters: Tensor
    cameras: Tensor


@torch.no_grad()
def number_camera_proxies(labels: Tensor, camids: Tensor) -> CameraProxies:
    """Split every cluster by camera and number the parts.

    Args:
        labels: Cluster of each image, int64, shape ``(M,)``; -1 for an outlier.
        camids: Camera of each image, int64, shape ``(M,)``, on any device; negative where
            unknown.

    Returns:
        The proxies, on the device of ``labels``, ordered by cluster and then by camera,
        with the unknown camera first.

    Raises:
        ValueError: If there is not one camera for each label.

    Example:
        >>> found = number_camera_proxies(
        ...     torch.tensor([0, 0, 1, -1, 1]), torch.tensor([4, 7, 7, 4, -1])
        ... )
        >>> [part.tolist() for part in found]
        [[0, 1, 3, -1, 2], [0, 0, 1, 1], [0, 1, -1, 1]]
    """
    if camids.shape != labels.shape:
        raise ValueError(
            f"camids must hold one camera for each of the {len(labels)} labels, got "
            f"shape {tuple(camids.shape)}"
        )
    clustered = labels >= 0
    known = camids.to(labels.device)[clustered].clamp(min=_UNKNOWN)
    # The appended entry puts the unknown camera first, even if no image has it.
    ids = torch.unique(torch.cat([known, known.new_full((1,), _UNKNOWN)]))
    place = torch.searchsorted(ids, known)
    pairs, proxy = torch.unique(labels[clustered] * len(ids) + place, return_inverse=True)
    proxies = torch.full_like(labels, _OUTLIER)
    proxies[clustered] = proxy
    return CameraProxies(proxies, pairs // len(ids), pairs % len(ids) - 1)


@torch.no_grad()
def camera_sum_weights(cameras: Tensor, batch_cameras: Tensor, counted: Tensor) -> Tensor:
    r"""Return weights that turn a mean over images into a sum of the cameras' means.

    If n images of the batch are counted and :math:`n_c` of them are from camera c, an image
    of camera c has the weight :math:`n / n_c`. In a distributed run the b images are this
    process's part of the batch.

    Args:
        cameras: Camera of each image to weight, int64, shape ``(b,)``; the unknown one, -1,
            counts as one camera.
        batch_cameras: Camera of each image of the whole batch, int64, shape ``(B,)``.
        counted: Whether the mean counts each image of the batch, bool, shape ``(B,)``.

    Returns:
        Float32 weights, shape ``(b,)``; undefined for images that are not counted.

    Example:
        >>> cameras, every = torch.tensor([0, 0, 0, 1]), torch.ones(4, dtype=torch.bool)
        >>> camera_sum_weights(cameras, cameras, every)
        tensor([1.3333, 1.3333, 1.3333, 4.0000])
    """
    same = (cameras[:, None] == batch_cameras[None, :]) & counted[None, :]
    return counted.sum() / same.sum(dim=1).clamp(min=1)


class CameraProxyMemory(nn.Module):
    """Bank of one vector per camera proxy, rebuilt after every clustering.

    A row starts as the mean of its images and is written with each of them in the batch,
    one after the other: ``normalize(momentum · row + (1 - momentum) · f)``.

    Args:
        num_images: Training images M.
        dim: Feature dimension C.
        momentum: Weight of the old row, in [0, 1].

    Attributes:
        bank: Unit rows, float32 ``(P, C)``; no rows before the first :meth:`reset`.
        proxies: Proxy of each image, int64 ``(M,)``, -1 for an outlier.
        clusters: Cluster of each proxy, int64 ``(P,)``.
        cameras: Camera of each proxy, int64 ``(P,)``, numbered as in
            :class:`CameraProxies`.

    Raises:
        ValueError: If ``momentum`` is outside [0, 1].

    References:
        Wang et al., "Camera-aware Proxies for Unsupervised Person Re-Identification", AAAI
        2021. https://arxiv.org/abs/2012.10674
    """

    proxies: Tensor
    clusters: Tensor
    cameras: Tensor

    def __init__(self, num_images: int, dim: int, *, momentum: float = 0.2) -> None:
        super().__init__()
        self.memory = ClusterMemory(torch.zeros(0, dim), momentum=momentum)
        unlabeled = torch.full((num_images,), _OUTLIER, dtype=torch.int64)
        self.register_buffer("proxies", unlabeled)
        self.register_buffer("clusters", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("cameras", torch.zeros(0, dtype=torch.int64))

    @property
    def bank(self) -> Tensor:
        """Row of each proxy, ``(P, C)``."""
        return self.memory.bank

    @torch.no_grad()
    def reset(self, features: Tensor, labels: Tensor, camids: Tensor) -> None:
        """Number the proxies of new clusters and set their rows to the images' means.

        Args:
            features: Unit vectors of all images, shape ``(M, C)``.
            labels: Cluster of each image, int64, shape ``(M,)``; -1 for an outlier.
            camids: Camera of each image, int64, shape ``(M,)``; negative where unknown.
        """
        found = number_camera_proxies(labels, camids)
        self.memory.reset(cluster_means(features, found.proxies))
        self.proxies.copy_(found.proxies)
        self.clusters = found.clusters.to(self.clusters)
        self.cameras = found.cameras.to(self.cameras)

    @torch.no_grad()
    def update(self, index: Tensor, features: Tensor) -> None:
        """Write a batch into the bank; call this once, after the optimizer step.

        Args:
            index: Index of each training image, int64, shape ``(B,)``; outliers write
                nothing.
            features: Shape ``(B, C)``; scaled to unit length here.
        """
        self.memory.update(features, self.proxies[index])

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        # The number of proxies in a checkpoint is that of its epoch.
        for name in ("clusters", "cameras"):
            loaded = state_dict.get(prefix + name)
            if loaded is not None:
                setattr(self, name, getattr(self, name).new_empty(loaded.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
