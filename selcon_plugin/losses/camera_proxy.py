r"""Losses between images and camera proxies: intra-camera, inter-camera, online-associated.

A camera proxy is the set of images that one camera has of one cluster. Each loss takes the
similarities of a batch to the rows of all proxies, so that several losses share one matrix
product, and is the mean over the images of

.. math::
    L_i = -\frac{1}{|\mathcal P_i|} \sum_{p \in \mathcal P_i} \log
        \frac{\exp(s_{ip} / \tau)}{\sum_{k \in \mathcal P_i \cup \mathcal N_i}
        \exp(s_{ik} / \tau)}

where the losses differ in their positives :math:`\mathcal P_i` and negatives
:math:`\mathcal N_i`. All raise ``ValueError`` if there is no proxy, if the temperature is
not positive, or if a number of positives or negatives is less than 1.

Shape shorthand in this module:

    B: images in the batch
    P: camera proxies
    C: feature dimension
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from selcon_plugin.distance import bank_product
from selcon_plugin.losses.instance_contrastive import class_similarity

_OUTLIER = -1


def intra_camera_loss(
    similarity: Tensor,
    targets: Tensor,
    cameras: Tensor,
    *,
    temperature: float = 0.07,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Discriminate an image's proxy from the other proxies of the same camera.

    The only positive is the own proxy; all other proxies of its camera are negatives. If
    the own camera is unknown there is no "same camera", and the loss of the image is 0.

    Args:
        similarity: Of each image to each proxy, shape ``(B, P)``.
        targets: Proxy of each image, int64, shape ``(B,)``; -1 for an outlier, which is
            ignored. A batch of nothing but outliers has loss 0.
        cameras: Camera of each proxy, int64, shape ``(P,)``; -1 where unknown.
        temperature: Softmax temperature τ; similarities are divided by it.
        sample_weight: Factor on each image's loss, shape ``(B,)``; None for 1. The mean is
            not divided by the weights.

    Returns:
        Scalar loss, mean over the images that have a proxy.

    Example:
        >>> similarity = torch.tensor([[1.0, 0.0, 0.9]])
        >>> cameras = torch.tensor([0, 0, 1])
        >>> own = torch.tensor([0])
        >>> loss = intra_camera_loss(similarity, own, cameras, temperature=1.0)
        >>> round(loss.item(), 4)  # log(1 + exp(-1))
        0.3133

    References:
        Wang et al., "Camera-aware Proxies for Unsupervised Person Re-Identification", AAAI
        2021. https://arxiv.org/abs/2012.10674
    """
    own = _own_proxy(similarity, targets)
    own_camera = cameras[own][:, None]
    every = torch.arange(len(cameras), device=cameras.device)
    return _contrast(
        similarity,
        (own[:, None] == every) & (own_camera >= 0),
        own_camera == cameras,
        targets,
        temperature,
        sample_weight,
    )


def inter_camera_loss(
    similarity: Tensor,
    targets: Tensor,
    clusters: Tensor,
    *,
    temperature: float = 0.07,
    num_negatives: int = 50,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Pull an image towards all proxies of its cluster, in every camera.

    The positives are the proxies of the own cluster, including the own one; the negatives
    are the most similar proxies of other clusters.

    Args:
        similarity: Of each image to each proxy, shape ``(B, P)``.
        targets: Proxy of each image, int64, shape ``(B,)``; -1 for an outlier, which is
            ignored. A batch of nothing but outliers has loss 0.
        clusters: Cluster of each proxy, int64, shape ``(P,)``.
        temperature: Softmax temperature τ; similarities are divided by it.
        num_negatives: Number of negatives, at least 1; fewer if there are fewer.
        sample_weight: Factor on each image's loss, shape ``(B,)``; None for 1. The mean is
            not divided by the weights.

    Returns:
        Scalar loss, mean over the images that have a proxy.

    References:
        Wang et al., "Camera-aware Proxies for Unsupervised Person Re-Identification", AAAI
        2021. https://arxiv.org/abs/2012.10674
    """
    own = _own_proxy(similarity, targets)
    positive = clusters[own][:, None] == clusters
    hardest = _most_similar(similarity, positive, num_negatives)
    return _contrast(
        similarity, positive, positive | hardest, targets, temperature, sample_weight
    )


def associate_proxies(
    similarity: Tensor, cameras: Tensor, *, num_positives: int = 3
) -> Tensor:
    """Choose the proxies that most likely show the same person, at most one per camera.

    The most similar proxy of each camera is a candidate, and the most similar candidates
    are chosen. Equally similar proxies are all chosen. The unknown camera counts as one
    more camera.

    Args:
        similarity: Of each image to each proxy, shape ``(B, P)``.
        cameras: Camera of each proxy, int64, shape ``(P,)``: numbers below P, as returned
            by :func:`~selcon_plugin.memory.camera_proxy.number_camera_proxies`; -1 where
            unknown.
        num_positives: Number of chosen proxies, at least 1; one for each camera if there
            are fewer cameras.

    Returns:
        True for the chosen proxies, bool, shape ``(B, P)``.

    Raises:
        ValueError: If ``num_positives`` is less than 1.

    Example:
        >>> similarity = torch.tensor([[0.9, 0.8, 0.1, 0.5]])
        >>> cameras = torch.tensor([0, 0, 1, 2])
        >>> associate_proxies(similarity, cameras, num_positives=2)
        tensor([[ True, False, False,  True]])
    """
    if num_positives < 1:
        raise ValueError(f"num_positives must be 1 or more, got {num_positives}")
    num_proxies = len(cameras)
    # There are no more cameras than proxies: this bound is known without waiting for a GPU.
    camera = torch.where(cameras < 0, num_proxies, cameras)
    best = class_similarity(similarity, camera, num_proxies + 1, "max")
    last = best.topk(min(num_positives, num_proxies + 1), dim=1).values[:, -1:]
    return (similarity == best[:, camera]) & (similarity >= last)


def online_association_loss(
    similarity: Tensor,
    bank: Tensor,
    targets: Tensor,
    cameras: Tensor,
    *,
    temperature: float = 0.07,
    image_weight: float = 0.15,
    num_positives: int = 3,
    num_negatives: int = 50,
    sample_weight: Tensor | None = None,
) -> Tensor:
    r"""Pull an image towards proxies of other cameras that are similar to it now.

    Clusters date from the last clustering. This loss finds positives on the batch instead.
    With an image's similarity mixed with that of its proxy v,

    .. math::
        q_{ik} = w\, s_{ik} + (1 - w)\, v_i \cdot v_k

    the positives are the proxies that :func:`associate_proxies` chooses by q, and the
    negatives are the other proxies of largest q, whatever their clusters. The choice has no
    gradient.

    Args:
        similarity: Of each image to each proxy, s, shape ``(B, P)``.
        bank: Unit row of each proxy, shape ``(P, C)``; a constant.
        targets: Proxy of each image, int64, shape ``(B,)``; -1 for an outlier, which is
            ignored. A batch of nothing but outliers has loss 0.
        cameras: Camera of each proxy, int64, shape ``(P,)``, as in
            :func:`associate_proxies`.
        temperature: Softmax temperature τ; similarities are divided by it.
        image_weight: w, weight of the image's own similarity; the rest is its proxy's.
        num_positives: Number of positive proxies, at least 1.
        num_negatives: Number of negatives, at least 1; fewer if there are fewer.
        sample_weight: Factor on each image's loss, shape ``(B,)``; None for 1. The mean is
            not divided by the weights.

    Returns:
        Scalar loss, mean over the images that have a proxy.

    Raises:
        ValueError: If ``image_weight`` is outside [0, 1], or in the cases above.

    References:
        Wang et al., "Offline-Online Associated Camera-Aware Proxies for Unsupervised Person
        Re-Identification", IEEE TIP 2022. https://arxiv.org/abs/2201.05820
    """
    if not 0.0 <= image_weight <= 1.0:
        raise ValueError(f"image_weight must lie in [0, 1], got {image_weight}")
    own = _own_proxy(similarity, targets)
    with torch.no_grad():
        mixed = torch.lerp(bank_product(bank[own], bank), similarity.float(), image_weight)
        positive = associate_proxies(mixed, cameras, num_positives=num_positives)
        hardest = _most_similar(mixed, positive, num_negatives)
    return _contrast(
        similarity, positive, positive | hardest, targets, temperature, sample_weight
    )


def _own_proxy(similarity: Tensor, targets: Tensor) -> Tensor:
    """Return the targets, with an arbitrary proxy for outliers."""
    if not similarity.shape[1]:
        raise ValueError("there are no camera proxies: cluster the images first")
    return targets.clamp(min=0)


@torch.no_grad()
def _most_similar(similarity: Tensor, left_out: Tensor, count: int) -> Tensor:
    """Mark the ``count`` most similar proxies of each row; ``left_out`` ones come last."""
    if count < 1:
        raise ValueError(f"num_negatives must be 1 or more, got {count}")
    others = similarity.masked_fill(left_out, -torch.inf)
    chosen = others.topk(min(count, others.shape[1]), dim=1).indices
    return torch.zeros_like(left_out).scatter_(1, chosen, True)


def _contrast(
    similarity: Tensor,
    positive: Tensor,
    candidates: Tensor,
    targets: Tensor,
    temperature: float,
    sample_weight: Tensor | None,
) -> Tensor:
    """Compute the loss in the module's docstring; the masks are ``(B, P)``."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    inside = targets != _OUTLIER
    positive = positive & inside[:, None]
    logits = similarity.float() / temperature
    # Not -inf: a row without candidates would be NaN.
    logits = logits.masked_fill(~candidates, torch.finfo(logits.dtype).min)
    log_prob = F.log_softmax(logits, dim=1).masked_fill(~positive, 0.0)
    losses = -log_prob.sum(dim=1) / positive.sum(dim=1).clamp(min=1)
    if sample_weight is not None:
        losses = losses * sample_weight
    return losses.sum() / inside.sum().clamp(min=1)
