"""Distances between the images of a batch and all rows of the memory banks.

Shape shorthand in this module:

    B: images in the batch
    M: bank rows, one per training image
    C: global feature dimension
    S: parts; D: part feature dimension
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of a half-precision bank converted to float32 at a time on a CPU, which has no fast
# half-precision product: 4096 rows of 2048 values take 32 MiB.
_CPU_CHUNK_ROWS = 4096


def bank_product(features: Tensor, bank: Tensor) -> Tensor:
    """Compute the inner products of every feature with every bank row, in float32.

    Autocast is disabled inside: rankings and logits need the full mantissa.

    Args:
        features: Shape ``(B, C)``, any floating type.
        bank: Shape ``(M, C)``, float32 or half precision.

    Returns:
        Float32 products, shape ``(B, M)``.
    """
    with torch.autocast(device_type=features.device.type, enabled=False):
        if bank.dtype == torch.float32:
            return features.float() @ bank.T
        if bank.is_cuda:
            # Tensor cores accumulate in float32; only the result is rounded once.
            return (features.to(bank.dtype) @ bank.T).float()
        chunks = torch.split(bank, _CPU_CHUNK_ROWS)
        return torch.cat([features.float() @ chunk.float().T for chunk in chunks], dim=1)


@torch.no_grad()
def fused_distance(
    global_features: Tensor,
    part_features: Tensor | None,
    camids: Tensor | None,
    global_bank: Tensor,
    part_bank: Tensor | None,
    bank_camids: Tensor | None,
    *,
    global_distance_weight: float = 0.5,
    same_camera_penalty: float = 0.05,
) -> Tensor:
    r"""Compute the fused distance: global and part terms, and a same-camera penalty.

    .. math::
        d(i, j) = w\,\lVert g_i - G_j \rVert^2
            + (1 - w) \frac{1}{S} \sum_s \lVert l_i^s - L_j^s \rVert^2
            + \lambda_c\,[c_i = c_j]

    All vectors must have unit length, so a squared distance is :math:`2 - 2\cos` and the
    computation needs only two matrix products. Without parts only the global distance is
    used. Without camera ids there is no penalty; negative ids mean "unknown" and match
    nothing. The result is computed in float32, also under autocast, without gradient.

    Args:
        global_features: Unit global features, shape ``(B, C)``.
        part_features: Unit part features, shape ``(B, S, D)``, or None.
        camids: Camera of each image, int64, shape ``(B,)``, or None.
        global_bank: Unit bank rows, shape ``(M, C)``.
        part_bank: Unit bank rows, shape ``(M, S, D)``, or None.
        bank_camids: Camera of each bank row, int64, shape ``(M,)``, or None.
        global_distance_weight: Weight w (the paper's λ_g) of the global distance, in [0,
            1].
        same_camera_penalty: The paper's λ_c, added to pairs from the same camera, ≥ 0.

    Returns:
        Distances, float32, shape ``(B, M)``; smaller is closer.

    Raises:
        ValueError: If exactly one of the two part tensors, or of the two camera tensors,
            is given.

    References:
        Pang et al., "Fully Unsupervised Person Re-identification via Selective Contrastive
        Learning", 2020. https://arxiv.org/abs/2010.07608
    """
    if (part_features is None) != (part_bank is None):
        raise ValueError("part_features and part_bank must be given together or not at all")
    if (camids is None) != (bank_camids is None):
        raise ValueError("camids and bank_camids must be given together or not at all")
    if part_features is None or part_bank is None:
        distance = bank_product(global_features, global_bank).mul_(-2.0).add_(2.0)
    else:
        num_parts = part_features.shape[1]
        distance = bank_product(global_features, global_bank)
        # The mean of l·L over parts is the product of the concatenations divided by S.
        part_cosine = bank_product(part_features.flatten(1), part_bank.flatten(1))
        distance.mul_(-2.0 * global_distance_weight)
        distance.add_(part_cosine, alpha=-2.0 * (1.0 - global_distance_weight) / num_parts)
        distance.add_(2.0)
    if camids is not None and bank_camids is not None and same_camera_penalty:
        known = (camids >= 0)[:, None]
        same = (camids[:, None] == bank_camids[None, :]) & known
        distance.add_(same, alpha=same_camera_penalty)
    return distance
