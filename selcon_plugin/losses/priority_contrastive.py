"""Contrastive loss over an instance bank whose positives are weighted by priority.

Shape shorthand in this module:

    B: images in the batch
    C: feature dimension
    R: rows of the bank, for instance one per training image
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from selcon_plugin.distance import bank_product


def priority_contrastive_loss(
    features: Tensor,
    bank: Tensor,
    priority: Tensor,
    *,
    temperature: float = 0.05,
    sample_weight: Tensor | None = None,
) -> Tensor:
    r"""Pull each image towards its positives in a bank, weighted by their priority.

    With the priority :math:`a_{ij}` of row j for image i the loss is

    .. math::
        L_i = -\frac{w_i}{\sum_j a_{ij}} \sum_j a_{ij} \log
            \frac{\exp(f_i \cdot v_j / \tau)}{\sum_k \exp(f_i \cdot v_k / \tau)}

    and the batch loss is the mean of :math:`L_i` over the images that have a positive. All
    rows are in the denominator. With one positive of any priority the loss is InfoNCE. The
    bank is a constant.

    Args:
        features: Shape ``(B, C)``, of any nonzero norm; scaled to unit length here.
        bank: Unit rows, shape ``(R, C)``.
        priority: Priorities of at least 0, float, shape ``(B, R)``; 0 where a row is not a
            positive. An image whose priorities are all 0 is ignored; a batch of only such
            images has loss 0.
        temperature: Softmax temperature τ; similarities are divided by it.
        sample_weight: Factor :math:`w_i` on each image's loss, shape ``(B,)``; None for 1.

    Returns:
        Scalar loss.

    Raises:
        ValueError: If the temperature is not positive, or ``priority`` does not have one
            entry for each image and row.

    Example:
        >>> import torch
        >>> loss = priority_contrastive_loss(
        ...     features=torch.tensor([[3.0, 0.0]]),
        ...     bank=torch.eye(2),
        ...     priority=torch.tensor([[1.0, 0.0]]),
        ...     temperature=1.0,
        ... )
        >>> round(loss.item(), 4)  # log(1 + exp(-1))
        0.3133

    References:
        Sun et al., "Hybrid Contrastive Learning with Cluster Ensemble for Unsupervised
        Person Re-identification", 2021. https://arxiv.org/abs/2201.11995
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if priority.shape != (len(features), len(bank)):
        raise ValueError(
            f"priority must have an entry for each of the {len(features)} images and "
            f"{len(bank)} rows, got shape {tuple(priority.shape)}"
        )
    unit = F.normalize(features.float(), dim=1)
    log_ratio = F.log_softmax(bank_product(unit, bank.detach()) / temperature, dim=1)
    total = priority.sum(dim=1)
    inside = total > 0
    losses = -(priority * log_ratio).sum(dim=1) / total.masked_fill(~inside, 1.0)
    if sample_weight is not None:
        losses = losses * sample_weight.to(losses)
    return losses.sum() / inside.sum().clamp(min=1)
