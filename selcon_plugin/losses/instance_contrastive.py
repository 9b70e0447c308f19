"""Losses between images and classes that are given by their instances.

A class is a cluster, or an outlier that is its own class. Its similarity to an image is
computed from the rows of its members in a bank of instances, by their mean, maximum or
minimum; there is no row for the class itself.

Shape shorthand in this module:

    B: images in the batch
    C: feature dimension
    R: rows of the bank, for instance one per training image
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from selcon_plugin.distance import bank_product

Reduction = Literal["mean", "max", "min"]

_OUTLIER = -1


def class_similarity(
    similarity: Tensor, labels: Tensor, num_classes: int, reduction: Reduction
) -> Tensor:
    """Reduce similarities to instances to one similarity per class.

    Args:
        similarity: Of each image to each row, shape ``(B, R)``.
        labels: Class of each row, int64, shape ``(R,)``; -1 for a row without a class.
        num_classes: Number of classes.
        reduction: ``"mean"``, ``"max"`` or ``"min"`` over the rows of a class.

    Returns:
        Shape ``(B, num_classes)``; minus infinity for a class without rows.

    Raises:
        ValueError: If ``reduction`` is unknown.

    Example:
        >>> similarity = torch.tensor([[0.9, 0.1, 0.5]])
        >>> labels = torch.tensor([0, 0, 1])
        >>> class_similarity(similarity, labels, 2, "mean")
        tensor([[0.5000, 0.5000]])
        >>> class_similarity(similarity, labels, 2, "max")
        tensor([[0.9000, 0.5000]])
    """
    if reduction not in get_args(Reduction):
        raise ValueError(
            f"reduction must be one of {', '.join(get_args(Reduction))}, got {reduction!r}"
        )
    # Rows without a class go to an extra column, which is cut off.
    column = torch.where(labels < 0, num_classes, labels)
    shape = (len(similarity), num_classes + 1)
    if reduction == "mean":
        counts = torch.bincount(column, minlength=num_classes + 1)
        sums = similarity.new_zeros(shape).index_add(1, column, similarity)
        reduced = (sums / counts.clamp(min=1))[:, :num_classes]
        return reduced.masked_fill(counts[:num_classes] == 0, -torch.inf)
    kind = "amax" if reduction == "max" else "amin"
    columns = column.expand(len(similarity), -1)
    start = similarity.new_full(shape, -torch.inf)
    return start.scatter_reduce(1, columns, similarity, kind, include_self=False)[
        :, :num_classes
    ]


def instance_contrastive_loss(
    features: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    targets: Tensor,
    *,
    temperature: float = 0.05,
    own: Reduction = "min",
    others: Reduction = "max",
    sample_weight: Tensor | None = None,
) -> Tensor:
    r"""Contrast each image with classes that are given by the instances of a bank.

    The loss is InfoNCE over the classes with the logits :math:`s_k / \tau`, where
    :math:`s_k` reduces the similarities of the image to the rows of class k. ``own`` is the
    reduction for the image's own class, ``others`` that for all other classes:

    * ``own="min", others="max"``: the hardest positive against the hardest negative of each
      class (HHCL, HDCPD, DCMIP).
    * ``own="mean", others="mean"``: the mean over the members (SpCL).

    Args:
        features: Shape ``(B, C)``, of any nonzero norm; scaled to unit length here.
        bank: Unit rows, shape ``(R, C)``; a constant.
        bank_labels: Class of each row, int64, shape ``(R,)``; -1 for a row without a class.
        targets: Class of each image, int64, shape ``(B,)``; -1 for an outlier, which is
            ignored. A batch of nothing but outliers has loss 0.
        temperature: Softmax temperature τ; similarities are divided by it.
        own: Reduction over the image's own class.
        others: Reduction over every other class.
        sample_weight: Factor on each image's loss, shape ``(B,)``; None for 1.

    Returns:
        Scalar loss: the mean over the images that have a class.

    Raises:
        ValueError: If the temperature is not positive, no row has a class, or an image's
            own class has no row.

    References:
        Ge et al., "Self-paced Contrastive Learning with Hybrid Memory", NeurIPS 2020.
        https://arxiv.org/abs/2006.02713

        Hu et al., "Hard-sample Guided Hybrid Contrast Learning for Unsupervised Person
        Re-Identification", 2021. https://arxiv.org/abs/2109.12333
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    num_classes = int(bank_labels.max()) + 1 if len(bank_labels) else 0
    if not num_classes:
        raise ValueError("no row of the bank has a class: cluster the images first")
    inside = targets != _OUTLIER
    count = int(inside.sum())
    if not count:
        return features.sum() * 0.0
    targets = targets[inside]
    unit = F.normalize(features[inside].float(), dim=1)
    similarity = bank_product(unit, bank.detach())
    logits = class_similarity(similarity, bank_labels, num_classes, others)
    if own != others:
        own_row = targets[:, None] == bank_labels
        masked = torch.where(own_row, similarity, torch.nan)
        logits = logits.scatter(1, targets[:, None], _reduce_row(masked, own)[:, None])
    if torch.isinf(logits.gather(1, targets[:, None])).any():
        raise ValueError("the own class of an image has no row in the bank")
    losses = F.cross_entropy(logits / temperature, targets, reduction="none")
    if sample_weight is not None:
        losses = losses * sample_weight[inside]
    return losses.mean()


def _reduce_row(masked: Tensor, reduction: Reduction) -> Tensor:
    """Reduce each row over its entries that are not NaN."""
    absent = masked.isnan()
    if reduction == "mean":
        return masked.masked_fill(absent, 0.0).sum(dim=1) / (~absent).sum(dim=1)
    if reduction == "min":
        return masked.masked_fill(absent, torch.inf).amin(dim=1)
    return masked.masked_fill(absent, -torch.inf).amax(dim=1)
