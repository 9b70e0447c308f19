"""Losses between images and single rows of a bank of instances.

Shape shorthand in this module:

    B: images in the batch
    C: feature dimension
    R: rows of the bank, one per training image
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from selcon_plugin.distance import bank_product

_OUTLIER = -1


def sample_to_instance_loss(
    features: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    targets: Tensor,
    *,
    temperature: float = 0.05,
    sample_weight: Tensor | None = None,
) -> Tensor:
    r"""Raise the probability of an image's own class in the softmax over all instances.

    .. math::
        L_i = -\log \frac{\sum_{j \in y_i} \exp(f_i \cdot v_j / \tau)}
            {\sum_j \exp(f_i \cdot v_j / \tau)}

    All rows are in the denominator, also those without a class: the row of an outlier is
    its own class. The exponentials of a class are summed, whereas
    :func:`instance_contrastive_loss` averages similarities: large classes have more weight,
    and one near member is enough for a small loss.

    Args:
        features: Shape ``(B, C)``, of any nonzero norm; scaled to unit length here.
        bank: Unit rows, shape ``(R, C)``; a constant.
        bank_labels: Class of each row, int64, shape ``(R,)``; -1 for an outlier.
        targets: Class of each image, int64, shape ``(B,)``; -1 for an outlier, which is
            ignored. A batch of nothing but outliers has loss 0.
        temperature: Softmax temperature τ; similarities are divided by it.
        sample_weight: Factor on each image's loss, shape ``(B,)``; None for 1.

    Returns:
        Scalar loss: the mean over the images that have a class.

    Raises:
        ValueError: If the temperature is not positive, or the own class of an image has no
            row.

    Example:
        >>> loss = sample_to_instance_loss(
        ...     features=torch.tensor([[1.0, 0.0]]),
        ...     bank=torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, -1.0]]),
        ...     bank_labels=torch.tensor([0, 0, 1]),
        ...     targets=torch.tensor([0]),
        ... )
        >>> round(loss.item(), 4)  # -log(2/3)
        0.4055

    References:
        Yin et al., "A Real-Time Memory Updating Strategy for Unsupervised Person
        Re-Identification", IEEE TIP 2023. https://doi.org/10.1109/TIP.2023.3266166
    """  # noqa: DOC502  (raised by the functions called here)
    logits = _similarity(features, bank, temperature) / temperature
    own = _own_rows(targets, bank_labels)
    losses = logits.logsumexp(dim=1) - logits.masked_fill(~own, -torch.inf).logsumexp(dim=1)
    return _mean_of_clustered(losses, targets, sample_weight)


def sample_constraint_loss(
    features: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    index: Tensor,
    targets: Tensor,
    *,
    temperature: float = 0.05,
    sample_weight: Tensor | None = None,
) -> Tensor:
    r"""Pull the hardest positive of an image closer than its hardest negative.

    .. math::
        L_i = \log(1 + \exp((s_i^- - s_i^+) / \tau))

    :math:`s_i^+` is the similarity to the least similar row of the own class, without the
    own row if there are others; :math:`s_i^-` is the similarity to the most similar row of
    another class. This is the softmax loss over these two rows. Rows of outliers are not
    used, because they may show the same person.

    Args:
        features: Shape ``(B, C)``, of any nonzero norm; scaled to unit length here.
        bank: Unit rows, shape ``(R, C)``; a constant.
        bank_labels: Class of each row, int64, shape ``(R,)``; -1 for an outlier.
        index: Own row of each image, int64, shape ``(B,)``.
        targets: Class of each image, int64, shape ``(B,)``; -1 for an outlier, which is
            ignored. A batch of nothing but outliers has loss 0.
        temperature: Temperature τ; the difference of similarities is divided by it.
        sample_weight: Factor on each image's loss, shape ``(B,)``; None for 1.

    Returns:
        Scalar loss: the mean over the images that have a class; 0 for an image without
        negatives.

    Raises:
        ValueError: If the temperature is not positive, or the own class of an image has no
            row.

    Example:
        >>> loss = sample_constraint_loss(
        ...     features=torch.tensor([[1.0, 0.0]]),
        ...     bank=torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]),
        ...     bank_labels=torch.tensor([0, 0, 1]),
        ...     index=torch.tensor([0]),
        ...     targets=torch.tensor([0]),
        ... )
        >>> round(loss.item(), 4)  # both similarities are 0: log 2
        0.6931

    References:
        Si et al., "Hybrid Contrastive Learning for Unsupervised Person Re-Identification",
        IEEE TMM 2022. https://doi.org/10.1109/TMM.2022.3174414
    """  # noqa: DOC502  (raised by the functions called here)
    similarity = _similarity(features, bank, temperature)
    own = _own_rows(targets, bank_labels)
    others = own & (torch.arange(len(bank), device=bank.device) != index[:, None])
    positive = torch.where(others.any(dim=1, keepdim=True), others, own)
    hardest_positive = similarity.masked_fill(~positive, torch.inf).amin(dim=1)
    negative = ~own & (bank_labels != _OUTLIER)
    hardest_negative = similarity.masked_fill(~negative, -torch.inf).amax(dim=1)
    losses = F.softplus((hardest_negative - hardest_positive) / temperature)
    return _mean_of_clustered(losses, targets, sample_weight)


def _similarity(features: Tensor, bank: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return bank_product(F.normalize(features.float(), dim=1), bank.detach())


def _own_rows(targets: Tensor, bank_labels: Tensor) -> Tensor:
    """Return which rows have each image's class, ``(B, R)``."""
    # All rows count as an outlier's own: its loss is finite until the mean leaves it out.
    own = (targets[:, None] == bank_labels) | (targets == _OUTLIER)[:, None]
    if not own.any(dim=1).all():
        raise ValueError("the own class of an image has no row in the bank")
    return own


def _mean_of_clustered(
    losses: Tensor, targets: Tensor, sample_weight: Tensor | None
) -> Tensor:
    if sample_weight is not None:
        losses = losses * sample_weight
    inside = targets != _OUTLIER
    return (losses * inside).sum() / inside.sum().clamp(min=1)
