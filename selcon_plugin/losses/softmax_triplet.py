"""Softmax triplet loss of the hardest positive and the hardest negative in the batch.

Shape shorthand in this module:

    B: images in the batch
    C: feature dimension
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from selcon_plugin.distance import bank_product

_OUTLIER = -1


def softmax_triplet_loss(
    features: Tensor, targets: Tensor, *, temperature: float = 1.0
) -> Tensor:
    r"""Pull each image closer to its farthest positive than to its nearest negative.

    .. math::
        L_i = -\log \frac{\exp(d_n / \tau)}{\exp(d_p / \tau) + \exp(d_n / \tau)}

    with the Euclidean distances :math:`d_p` to the farthest image of the own class and
    :math:`d_n` to the nearest image of another class, both in this batch. There is no
    margin. The only image of a class has :math:`d_p = 0`.

    Args:
        features: Shape ``(B, C)``, of any nonzero norm; scaled to unit length here.
        targets: Class of each image, int64, shape ``(B,)``; -1 for an outlier, which is
            neither anchor, positive nor negative.
        temperature: τ; distances are divided by it. A loss on features of norm r
            corresponds to τ = 1 / r.

    Returns:
        Scalar loss: the mean over the images that have a class and a negative; 0 if there
        are none.

    Raises:
        ValueError: If the temperature is not positive.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
        >>> loss = softmax_triplet_loss(features, torch.tensor([0, 0, 1]))
        >>> round(loss.item(), 4)  # log(1 + exp(0 - 2))
        0.1269

    References:
        Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification", 2017
        (hardest pairs of the batch). https://arxiv.org/abs/1703.07737

        Cho et al., "Part-based Pseudo Label Refinement for Unsupervised Person
        Re-identification", CVPR 2022 (as used there). https://arxiv.org/abs/2203.14675
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    unit = F.normalize(features.float(), dim=1)
    distance = (2.0 - 2.0 * bank_product(unit, unit)).clamp(min=1e-12).sqrt()
    inside = targets != _OUTLIER
    same = targets[:, None] == targets
    itself = torch.eye(len(targets), dtype=torch.bool, device=targets.device)
    farthest = distance.masked_fill(~same | itself, 0.0).amax(dim=1)
    negative = ~same & inside
    nearest = distance.masked_fill(~negative, 2.0).amin(dim=1)  # 2 is the largest distance
    losses = F.softplus((farthest - nearest) / temperature)
    anchors = inside & negative.any(dim=1)
    return (losses * anchors).sum() / anchors.sum().clamp(min=1)
