"""ISE: support samples between clusters, generated in the feature space.

Clusters of images often contain only a part of one person's images, or several persons. ISE
fills the space between clusters with support samples: an image's feature is moved slightly
from its own cluster towards the nearest other one. Support samples are trained like images
of the own cluster, and make it more compact.

Zhang et al., "Implicit Sample Extension for Unsupervised Person Re-Identification", CVPR
2022. https://arxiv.org/abs/2204.06892
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from selcon_plugin.distance import bank_product
from selcon_plugin.features import Embeddings
from selcon_plugin.losses import class_similarity
from selcon_plugin.methods.base import register_method
from selcon_plugin.methods.cluster_contrast import ClusterContrast
from selcon_plugin.options import Choice, Interval

_OUTLIER = -1


def interpolation_degree(progress: float) -> float:
    r"""Return the degree :math:`\lambda = \frac{1}{2} \ln((e - 1) t + 1)` of the step t.

    Args:
        progress: t, the completed fraction of the training, from 0 to 1; larger values
            count as 1.

    Returns:
        The degree, from 0 to 1/2, which rises fast at first.

    Example:
        >>> interpolation_degree(0.0), interpolation_degree(1.0)
        (0.0, 0.5)
    """
    return 0.5 * math.log((math.e - 1.0) * min(progress, 1.0) + 1.0)


@torch.no_grad()
def nearest_other_cluster(features: Tensor, bank: Tensor, targets: Tensor) -> Tensor:
    """Find the cluster most similar to each image, except its own.

    Args:
        features: Unit vectors, shape ``(B, C)``.
        bank: One unit vector per cluster, shape ``(num_clusters, C)``.
        targets: Own cluster of each image, int64, shape ``(B,)``, 0 or more.

    Returns:
        Clusters, int64, shape ``(B,)``; the own one if there is no other.
    """
    similarity = bank_product(features, bank)
    return similarity.scatter(1, targets[:, None], -torch.inf).argmax(dim=1)


def support_samples(
    features: Tensor, bank: Tensor, targets: Tensor, *, degree: float
) -> Tensor:
    r"""Move each feature from its own cluster towards the nearest other one.

    .. math::
        s = \frac{u}{\lVert u \rVert}, \qquad u = f + \frac{\lambda}{2} (c_n - c_y)

    with the vectors :math:`c_y` of the image's cluster and :math:`c_n` of the other cluster
    most similar to f. The gradient reaches f; the bank is a constant.

    Args:
        features: Shape ``(B, C)``; scaled to unit length here.
        bank: One unit vector per cluster, shape ``(num_clusters, C)``.
        targets: Cluster of each image, int64, shape ``(B,)``; -1 for an outlier, whose
            support sample is undefined.
        degree: λ; see :func:`interpolation_degree`.

    Returns:
        Float32 unit vectors, shape ``(B, C)``.

    Example:
        >>> f, bank = torch.tensor([[1.0, 0.0]]), torch.eye(2)
        >>> support_samples(f, bank, torch.tensor([0]), degree=1.0)  # between the clusters
        tensor([[0.7071, 0.7071]])
    """
    unit = F.normalize(features.float(), dim=1)
    bank = bank.detach()
    own = targets.clamp(min=0)
    nearest = nearest_other_cluster(unit, bank, own)
    return F.normalize(unit + 0.5 * degree * (bank[nearest] - bank[own]), dim=1)


def label_preserving_loss(
    features: Tensor, supports: Tensor, targets: Tensor, *, temperature: float = 0.6
) -> Tensor:
    r"""Pull each image towards the farthest support sample of its cluster.

    The loss is InfoNCE over the clusters of the batch. An image's similarity to its own
    cluster is the smallest one to a support sample of the cluster, and its similarity to
    each other cluster is the largest one.

    Args:
        features: Shape ``(B, C)``; scaled to unit length here.
        supports: Unit support samples of the same images, shape ``(B, C)``, with gradient.
        targets: Cluster of each image, int64, shape ``(B,)``; -1 for an outlier, which is
            ignored with its support sample. A batch of nothing but outliers has loss 0.
        temperature: Softmax temperature τ; similarities are divided by it.

    Returns:
        Scalar loss: the mean over the images that have a cluster.

    Raises:
        ValueError: If the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    # The number of a cluster is its first position in the batch: there are few columns
    # then, and nothing waits for the device.
    batch_size = len(targets)
    places = torch.arange(batch_size, device=targets.device)
    same = targets[:, None] == targets
    classes = torch.where(same, places, batch_size).amin(dim=1)
    classes = torch.where(targets == _OUTLIER, _OUTLIER, classes)
    own = classes.clamp(min=0)[:, None]
    similarity = bank_product(F.normalize(features.float(), dim=1), supports) / temperature
    nearest = class_similarity(similarity, classes, batch_size, "max")
    farthest = class_similarity(similarity, classes, batch_size, "min")
    logits = nearest.scatter(1, own, farthest.gather(1, own))
    # Not -inf: in a row of only -inf the softmax, and its gradient, would be NaN.
    logits = logits.clamp(min=torch.finfo(logits.dtype).min)
    total = F.cross_entropy(logits, classes, ignore_index=_OUTLIER, reduction="sum")
    return total / (classes != _OUTLIER).sum().clamp(min=1)


@register_method("ISE")
class ISE(ClusterContrast):
    """Implicit Sample Extension: Cluster Contrast on images and support samples.

    As in the release, support samples are written into the memory like images. Unlike in
    the release, the degree rises from epoch to epoch and not from step to step, and the
    label-preserving loss does not require clusters of equal size in a batch.

    Args:
        num_images: Training images M.
        global_dim: Global feature dimension C.
        num_parts: Not used.
        part_dim: Not used.
        bank_momentum: Weight of the old row when the memory is written.
        cluster_update: Samples that write their cluster's row, as in
            :class:`ClusterContrast`.
        support_weight: Weight of a support sample in the contrast relative to an image;
            with 0 support samples are neither trained nor written.
        support_epochs: Epochs until support samples have the full degree, usually those of
            the run.
        preserving_weight: Weight of the label-preserving loss; for MSMT17 0.01.
        preserving_temperature: τ of the label-preserving loss.
        **options: The other options of :class:`ClusterContrast`.
    """

    def __init__(
        self,
        num_images: int,
        global_dim: int,
        num_parts: int = 0,
        part_dim: int = 0,
        *,
        bank_momentum: Annotated[float, Interval(0, 1)] = 0.2,
        cluster_update: Annotated[str, Choice(("mean", "hard"))] = "hard",
        support_weight: Annotated[float, Interval(0)] = 1.0,
        support_epochs: Annotated[int, Interval(1)] = 70,
        preserving_weight: Annotated[float, Interval(0)] = 0.1,
        preserving_temperature: Annotated[float, Interval(0, above=True)] = 0.6,
        **options: Any,
    ) -> None:
        super().__init__(
            num_images,
            global_dim,
            num_parts,
            part_dim,
            bank_momentum=bank_momentum,
            cluster_update=cluster_update,
            **options,
        )
        self.support_weight = support_weight
        self.support_epochs = support_epochs
        self.preserving_weight = preserving_weight
        self.preserving_temperature = preserving_temperature

    def _supports(self, features: Tensor, targets: Tensor) -> Tensor:
        degree = interpolation_degree(self.epoch / self.support_epochs)
        return support_samples(features, self.memory.bank, targets, degree=degree)

    def loss(
        self,
        embeddings: Embeddings,
        index: Tensor,
        camids: Tensor | None,
        *views: Embeddings,
    ) -> dict[str, Tensor]:
        """Contrast images and support samples with all clusters; preserve the labels."""
        losses = super().loss(embeddings, index, camids)
        targets = self.labels[index]
        supports = self._supports(embeddings.global_features, targets)
        if self.support_weight:
            extended = super().loss(Embeddings(supports), index, camids)
            share = self.support_weight / (1.0 + self.support_weight)
            for name, loss in extended.items():
                losses[name] = (1.0 - share) * losses[name] + share * loss
        if self.preserving_weight:
            losses["loss_preserving"] = self.preserving_weight * label_preserving_loss(
                embeddings.global_features,
                supports,
                targets,
                temperature=self.preserving_temperature,
            )
        return losses

    def _write(self, index: Tensor, features: Tensor, targets: Tensor) -> None:
        if self.support_weight:
            # The bank has not changed since the loss: these are the same support samples.
            features = torch.cat([features, self._supports(features, targets)])
            targets = targets.repeat(2)
        self.memory.update(features, targets)
