"""Sample weights that favor clusters seen by several cameras.

From a cluster that only one camera sees, a network learns the appearance of that camera as
much as that of the person. Three papers reduce its weight, each in its own way; the weights
multiply the images' losses.

Shape shorthand in this module:

    B: images in the batch
    M: training images
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from selcon_plugin.distributed import gather_batch, rank

CameraEntropyMode = Literal["batch", "cluster", "multi_camera"]
# Values of a method's option: a mode, or no weights.
CAMERA_WEIGHTS = ("none", *get_args(CameraEntropyMode))


def cluster_camera_entropy(labels: Tensor, camids: Tensor) -> Tensor:
    r"""Compute the entropy of the cameras that see each cluster, over the whole data set.

    :math:`H = -\sum_c p_c \ln p_c`, where :math:`p_c` is the fraction of the cluster's
    images that camera c took. It is 0 for a cluster of one camera, and at most :math:`\ln`
    of the number of cameras. Images of unknown camera are left out; a cluster that has only
    such images has entropy 0.

    Args:
        labels: Cluster of each image, int64, shape ``(M,)``; -1 for an outlier, which is
            left out.
        camids: Camera of each image, int64, shape ``(M,)``; negative where unknown.

    Returns:
        Entropies in nats, float32, shape ``(num_clusters,)``.

    Raises:
        ValueError: If there is not one camera for each label.

    Example:
        >>> cluster_camera_entropy(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 2, 2]))
        tensor([0.6931, 0.0000])
    """
    if camids.shape != labels.shape:
        raise ValueError(
            f"camids must hold one camera for each of the {len(labels)} labels, got "
            f"shape {tuple(camids.shape)}"
        )
    if not len(labels):
        return torch.zeros(0, device=labels.device)
    camids = camids.to(labels.device)
    known = (labels >= 0) & (camids >= 0)
    num_cameras = camids.max() + 1
    pairs, counts = torch.unique(
        labels[known] * num_cameras + camids[known], return_counts=True
    )
    clusters = pairs // num_cameras
    zeros = torch.zeros(int(labels.max()) + 1, device=labels.device)
    share = counts / zeros.index_add(0, clusters, counts.float())[clusters]
    return zeros.index_add(0, clusters, -share * share.log())


def _batch_weights(targets: Tensor, camids: Tensor) -> Tensor:
    """Return the weights of 3C: e^H of the cluster in this batch, with mean 1."""
    clustered = targets >= 0
    same_cluster = (targets[:, None] == targets[None, :]) & clustered[:, None]  # (B, B)
    fellows = same_cluster & (camids >= 0)[None, :]  # of known camera
    same_camera = fellows & (camids[:, None] == camids[None, :])
    num_fellows = fellows.sum(dim=1).clamp(min=1)
    # -log2 p of each image's camera in its cluster; H is the mean over the cluster's images
    # of known camera. It is a sum and not a matrix product, which autocast would round.
    surprise = (num_fellows / same_camera.sum(dim=1).clamp(min=1)).log2()
    entropy = (fellows * surprise).sum(dim=1) / num_fellows
    weights = entropy.exp() * clustered
    # Each image counts as a fraction of its cluster: every cluster counts once.
    part = clustered / same_cluster.sum(dim=1).clamp(min=1)
    mean = (weights * part).sum() / part.sum().clamp(min=1)
    return weights / mean.clamp(min=1)  # e^H is at least 1: only outliers have weight 0


def camera_entropy_weights(
    targets: Tensor,
    camids: Tensor,
    *,
    mode: CameraEntropyMode,
    cluster_entropy: Tensor | None = None,
) -> Tensor:
    r"""Weight each image by the entropy of the cameras in its cluster.

    * ``"batch"`` (3C): :math:`e^H` with H in bits, from the cameras of the cluster's images
      in this batch, divided by its mean over the clusters of the batch, each of which
      counts once.
    * ``"cluster"`` (CALR): :math:`\ln(1 + H)` with H in nats over the whole data set. It is
      not scaled: two cameras with equally many images give 0.527, so that the loss becomes
      smaller.
    * ``"multi_camera"`` (JCL's filter as a weight): 1 if several cameras see the cluster in
      the data set, else 0.

    Images of unknown camera are left out of the histograms and get their cluster's weight.
    If no cluster of the data set has several cameras (there is one camera, or none is
    known), the last two modes give every cluster weight 1; otherwise all weights are 0 in a
    batch without a cluster of several cameras. An outlier's weight is 0.

    In a distributed run ``"batch"`` uses only this process's images. Nothing waits for the
    device.

    Args:
        targets: Cluster of each image, int64, shape ``(B,)``; -1 for an outlier.
        camids: Camera of each image, int64, shape ``(B,)``; negative where unknown. Only
            ``"batch"`` uses it.
        mode: ``"batch"``, ``"cluster"`` or ``"multi_camera"``.
        cluster_entropy: Result of :func:`cluster_camera_entropy` for the current clusters,
            shape ``(num_clusters,)``; needed by ``"cluster"`` and ``"multi_camera"``.

    Returns:
        Float32 weights, shape ``(B,)``.

    Raises:
        ValueError: If ``mode`` is unknown, there is not one camera for each target, or
            ``cluster_entropy`` is missing.

    Example:
        >>> targets, camids = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 2, 2])
        >>> camera_entropy_weights(targets, camids, mode="batch")  # e : 1
        tensor([1.4621, 1.4621, 0.5379, 0.5379])

    References:
        Zheng et al., "3C: Confidence-Guided Clustering and Contrastive Learning for
        Unsupervised Person Re-Identification", 2024. https://arxiv.org/abs/2408.09464

        Li et al., "Camera-aware Label Refinement for Unsupervised Person
        Re-identification" (CALR), 2024. https://arxiv.org/abs/2403.16450

        Zhang et al., "Joint Contrastive Learning" (JCL), Remote Sensing 16(2), 2024.
    """
    if mode not in get_args(CameraEntropyMode):
        raise ValueError(
            f"mode must be one of {', '.join(get_args(CameraEntropyMode))}, got {mode!r}"
        )
    if camids.shape != targets.shape:
        raise ValueError(
            f"camids must hold one camera for each of the {len(targets)} targets, got "
            f"shape {tuple(camids.shape)}"
        )
    if mode == "batch":
        return _batch_weights(targets, camids)
    if cluster_entropy is None:
        raise ValueError(
            f"mode {mode!r} needs cluster_entropy: compute it with cluster_camera_entropy "
            "whenever the images are clustered"
        )
    per_cluster = cluster_entropy.log1p() if mode == "cluster" else cluster_entropy > 0
    per_cluster = torch.where((cluster_entropy > 0).any(), per_cluster.float(), 1.0)
    # Outliers read an appended 0, which also works without any cluster.
    return torch.cat([per_cluster, per_cluster.new_zeros(1)])[targets]


class CameraWeighting(nn.Module):
    """Camera entropy weights of a method: set for new clusters, evaluated for a batch.

    Args:
        num_images: Training images M.
        mode: One of :data:`CAMERA_WEIGHTS`.

    Attributes:
        entropy: Entropy of each image's cluster, float32 ``(M,)``; kept per image, so that
            the state's size does not change with the clusters.
    """

    entropy: Tensor

    def __init__(self, num_images: int, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.register_buffer("entropy", torch.zeros(num_images))

    @torch.no_grad()
    def prepare(self, labels: Tensor, camids: Tensor | None) -> None:
        """Compute and store the camera entropy of each cluster.

        Args:
            labels: Cluster of each image, int64 ``(M,)``, -1 for an outlier.
            camids: Camera of each image, int64 ``(M,)``, -1 where unknown, or None.
        """
        self.entropy.zero_()
        if self.mode == "none" or camids is None:
            return
        per_cluster = cluster_camera_entropy(labels, camids)
        clustered = labels >= 0
        self.entropy[clustered] = per_cluster[labels[clustered]].to(self.entropy)

    @torch.no_grad()
    def forward(
        self, index: Tensor, targets: Tensor, camids: Tensor | None
    ) -> Tensor | None:
        """Return the weights of a batch.

        Args:
            index: Index of each training image, int64 ``(B,)``.
            targets: Cluster of each image, int64 ``(B,)``, -1 for an outlier.
            camids: Camera of each image, int64 ``(B,)``, or None.

        Returns:
            Float32 weights ``(B,)``, 1 for outliers; None if there are no weights.
        """
        if self.mode == "none" or camids is None:
            return None
        if self.mode == "batch":
            # The histogram is over the whole batch, across all ranks.
            own_rank = torch.full_like(targets, rank())
            shared = gather_batch(torch.stack([targets, camids, own_rank], dim=1))
            whole = camera_entropy_weights(shared[:, 0], shared[:, 1], mode="batch")
            weights = whole[shared[:, 2] == rank()]
        else:
            weights = camera_entropy_weights(
                index,
                camids,
                mode=self.mode,  # type: ignore[arg-type]
                cluster_entropy=self.entropy,
            )
        return torch.where(targets < 0, 1.0, weights)
