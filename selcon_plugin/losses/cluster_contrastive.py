"""Cluster contrastive loss between an image and the vectors of all clusters.

Shape shorthand in this module:

    B: images in the batch
    C: feature dimension
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selcon_plugin.distance import bank_product

_OUTLIER = -1


def _check_settings(temperature: float, focal_gamma: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if not focal_gamma >= 0:
        raise ValueError(f"focal_gamma must be 0 (off) or more, got {focal_gamma}")


def cluster_contrastive_loss(
    features: Tensor,
    bank: Tensor,
    targets: Tensor,
    *,
    temperature: float = 0.05,
    sample_weight: Tensor | None = None,
    focal_gamma: float = 0.0,
    detach_focal: bool = False,
) -> Tensor:
    r"""Pull each image towards its cluster's vector and away from all others.

    For the unit vector :math:`f_i` of an image of cluster :math:`y` the loss is

    .. math::
        L_i = -w_i (1 - p_y)^\gamma \log p_y, \qquad
            p_y = \frac{\exp(f_i \cdot v_y / \tau)}{\sum_k \exp(f_i \cdot v_k / \tau)}

    and the batch loss is the mean of :math:`L_i` over the images that have a cluster. The
    mean is not divided by the weights: if all weights are 2, the loss doubles. With
    :math:`\gamma = 0` and no weights this is InfoNCE over the clusters. The focal factor
    has a gradient unless ``detach_focal`` is set; cluster-guided asymmetric contrast uses
    :math:`\gamma = 4`.

    The features are scaled to unit length here, and the bank is used as it is. The bank is
    a constant: it gets no gradient and is never written. Logits and softmax are at least
    float32, also under autocast.

    Args:
        features: Shape ``(B, C)``, of any nonzero norm.
        bank: One vector per cluster, shape ``(num_clusters, C)``.
        targets: Cluster of each image, int64, shape ``(B,)``; -1 for an outlier, which is
            ignored. A batch of nothing but outliers has loss 0.
        temperature: Softmax temperature τ; similarities are divided by it.
        sample_weight: Factor :math:`w_i` on each image's loss, shape ``(B,)``, for instance
            from :func:`~selcon_plugin.losses.camera_weights.camera_entropy_weights`;
            None for 1.
        focal_gamma: Exponent of the focal factor, at least 0 (off): the larger it is, the
            less well-matched images count.
        detach_focal: Whether the focal factor is a constant weight: the gradient is then
            that of InfoNCE times the factor.

    Returns:
        Scalar loss.

    Raises:
        ValueError: If the bank is empty, ``temperature`` is not positive, ``focal_gamma``
            is negative, or ``sample_weight`` does not have one entry per image.

    Example:
        >>> bank = torch.eye(2)
        >>> loss = cluster_contrastive_loss(
        ...     features=torch.tensor([[3.0, 0.0]]),
        ...     bank=bank,
        ...     targets=torch.tensor([0]),
        ...     temperature=1.0,
        ... )
        >>> round(loss.item(), 4)  # log(1 + exp(-1))
        0.3133

    References:
        Dai et al., "Cluster Contrast for Unsupervised Person Re-Identification", 2022.
        https://arxiv.org/abs/2103.11568

        Li et al., "Cluster-guided Asymmetric Contrastive Learning for Unsupervised Person
        Re-Identification", 2022 (the focal factor). https://arxiv.org/abs/2106.07846
    """
    _check_settings(temperature, focal_gamma)
    if not len(bank):
        raise ValueError("bank has no rows: cluster the images and fill it first")
    if sample_weight is not None and sample_weight.shape != targets.shape:
        raise ValueError(
            f"sample_weight must have one entry for each of the {len(targets)} images, got "
            f"shape {tuple(sample_weight.shape)}"
        )
    dtype = torch.promote_types(features.dtype, torch.float32)
    unit = F.normalize(features.to(dtype), dim=1)
    bank = bank.detach()
    if dtype == torch.float64:
        similarity = unit @ bank.double().T
    else:
        similarity = bank_product(unit, bank)
    losses = F.cross_entropy(
        similarity / temperature, targets, ignore_index=_OUTLIER, reduction="none"
    )
    if focal_gamma:
        # At p_y = 1, a perfect match, an exponent below 1 has an infinite gradient.
        others = (-torch.expm1(-losses)).clamp(min=torch.finfo(dtype).tiny)  # 1 - p_y
        factor = others**focal_gamma
        losses = losses * (factor.detach() if detach_focal else factor)
    if sample_weight is not None:
        losses = losses * sample_weight.to(losses)
    return losses.sum() / (targets != _OUTLIER).sum().clamp(min=1)


class ClusterContrastiveLoss(nn.Module):
    """:func:`cluster_contrastive_loss` with its settings.

    Args:
        temperature: Softmax temperature τ.
        focal_gamma: Exponent of the focal factor, at least 0 (off).
        detach_focal: Whether the focal factor is a constant.

    Example:
        >>> criterion = ClusterContrastiveLoss(temperature=1.0)
        >>> loss = criterion(torch.eye(2), torch.eye(2), torch.tensor([0, 1]))
        >>> loss.shape
        torch.Size([])
    """

    def __init__(
        self,
        temperature: float = 0.05,
        focal_gamma: float = 0.0,
        detach_focal: bool = False,
    ) -> None:
        super().__init__()
        _check_settings(temperature, focal_gamma)
        self.temperature = temperature
        self.focal_gamma = focal_gamma
        self.detach_focal = detach_focal

    def extra_repr(self) -> str:
        """Describe the settings in ``print(model)``."""
        return (
            f"temperature={self.temperature}, focal_gamma={self.focal_gamma}, "
            f"detach_focal={self.detach_focal}"
        )

    def forward(
        self,
        features: Tensor,
        bank: Tensor,
        targets: Tensor,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss; arguments and result as in the function.

        Args:
            features: Shape ``(B, C)``.
            bank: Shape ``(num_clusters, C)``.
            targets: Shape ``(B,)``.
            sample_weight: Shape ``(B,)`` or None.

        Returns:
            Scalar loss.
        """
        return cluster_contrastive_loss(
            features,
            bank,
            targets,
            temperature=self.temperature,
            sample_weight=sample_weight,
            focal_gamma=self.focal_gamma,
            detach_focal=self.detach_focal,
        )
