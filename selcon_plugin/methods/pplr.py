"""PPLR: parts refine the global labels, and cross agreement smooths the parts' labels.

If a part has the same neighbors as the whole image, its label can be trusted. If not, the
part shows something else, such as background or an occlusion. This cross agreement
determines how strongly a part is trained with its label, and the weight of its prediction
in the labels that train the global feature.

Cho et al., "Part-based Pseudo Label Refinement for Unsupervised Person Re-identification",
CVPR 2022. https://arxiv.org/abs/2203.14675
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from selcon_plugin.clustering import PseudoLabels, nearest_neighbors
from selcon_plugin.distance import bank_product
from selcon_plugin.distributed import gather_batch
from selcon_plugin.features import Embeddings
from selcon_plugin.losses import softmax_triplet_loss
from selcon_plugin.memory.cluster import ClusterMemory
from selcon_plugin.memory.writes import cluster_means
from selcon_plugin.methods.base import Method, register_method
from selcon_plugin.options import Choice, Interval

# Number of images whose lists of neighbors are compared at a time.
_ROWS = 4096


def _list_agreement(one: Tensor, other: Tensor) -> Tensor:
    """Return the Jaccard index of each row's lists: ``(M, k)``, ``(M, k)`` to ``(M,)``."""
    common = torch.cat(
        [
            (a[:, :, None] == b[:, None, :]).sum(dim=(1, 2))
            for a, b in zip(torch.split(one, _ROWS), torch.split(other, _ROWS), strict=True)
        ]
    )
    return common / (2 * one.shape[1] - common).clamp(min=1)


@torch.no_grad()
def cross_agreement(
    global_features: Tensor, part_features: Tensor, *, num_neighbors: int = 20
) -> Tensor:
    """Measure how many neighbors each part has in common with the whole image.

    The measure is the Jaccard index (common images over images in either list) of the k
    nearest images in the space of the global features and in that of the part. No M x M
    matrix is stored.

    Args:
        global_features: Unit vectors of all images, shape ``(M, C)``.
        part_features: Unit vectors, shape ``(M, S, D)``.
        num_neighbors: k, not counting the image itself.

    Returns:
        Float32, shape ``(M, S)``, from 0 (no common neighbor) to 1 (all are common).
    """
    count = num_neighbors + 1
    wholes = nearest_neighbors(global_features, count).index[:, 1:]
    parts = [
        nearest_neighbors(part.contiguous(), count).index[:, 1:]
        for part in part_features.unbind(dim=1)
    ]
    return torch.stack([_list_agreement(wholes, part) for part in parts], dim=1)


def refined_targets(
    targets: Tensor, part_logits: Tensor, agreement: Tensor, *, part_weight: float = 0.5
) -> Tensor:
    r"""Mix the labels with the predictions of the parts.

    .. math::
        \tilde y = (1 - b)\, y + b \sum_s w_s\, q_s, \qquad w = \mathrm{softmax}(a)

    with the one-hot label y, the weight b, the part's prediction :math:`q_s` and its cross
    agreement :math:`a_s`. The result has no gradient.

    Args:
        targets: Cluster of each image, int64, shape ``(B,)``, 0 or more.
        part_logits: Shape ``(B, S, num_clusters)``.
        agreement: Cross agreement, shape ``(B, S)``.
        part_weight: b.

    Returns:
        Probabilities, shape ``(B, num_clusters)``.
    """
    predictions = part_logits.detach().softmax(dim=2)  # (B, S, num_clusters)
    weights = agreement.softmax(dim=1)[:, :, None]
    opinion = (weights * predictions).sum(dim=1)
    label = F.one_hot(targets, part_logits.shape[2]).to(opinion)
    return torch.lerp(label, opinion, part_weight)


def agreement_smoothed_loss(
    part_logits: Tensor, targets: Tensor, agreement: Tensor
) -> Tensor:
    r"""Train each part with its label or with a uniform target, weighted by agreement.

    .. math::
        L = a\, \mathrm{CE}(y, q) + (1 - a)\, \mathrm{KL}(u \,\|\, q)

    with the uniform distribution u over the clusters.

    Args:
        part_logits: Shape ``(B, S, num_clusters)``.
        targets: Cluster of each image, int64, shape ``(B,)``, 0 or more.
        agreement: Cross agreement a, shape ``(B, S)``.

    Returns:
        Losses, shape ``(B, S)``.
    """
    log_prob = part_logits.log_softmax(dim=2)
    own = targets[:, None, None].expand(-1, part_logits.shape[1], 1)
    cross_entropy = -log_prob.gather(2, own).squeeze(2)
    divergence = -log_prob.mean(dim=2) - math.log(part_logits.shape[2])
    return agreement * cross_entropy + (1.0 - agreement) * divergence


@register_method("PPLR")
class PPLR(Method):
    """Part-based pseudo label refinement, without the camera term.

    The classifiers are a reconstruction. The paper trains a linear layer for the global
    feature and one for each part, and overwrites their rows with the clusters' means at
    every clustering. A method has no trained weights here: predictions are softmaxes over
    memories that contain the same means, one for the global feature and one for each part,
    and follow the batches with a momentum. Features have unit length here, whereas the
    release uses their norm after batch normalization: similarities, and the distances of
    the triplet loss, are divided by a temperature instead.

    The loss has three terms: the cross-entropy of the global prediction against
    :func:`refined_targets`; for the parts the cross-entropy with smoothed labels at first,
    then :func:`agreement_smoothed_loss`, averaged over the parts; and a softmax triplet
    loss of the global features. Outliers are ignored.

    Args:
        num_images: Training images M.
        global_dim: Global feature dimension C.
        num_parts: Parts S, at least 1.
        part_dim: Part feature dimension D.
        temperature: τ, by which similarities and distances are divided.
        bank_momentum: Weight of the old row when a memory is written.
        cluster_update: Samples that write their cluster's rows: ``"mean"`` for all of the
            batch, one after the other; ``"hard"`` for the one least similar to the row.
        num_agreement_neighbors: k, neighbors compared for the cross agreement.
        part_weight: Weight of the parts' predictions in the global labels.
        label_smoothing: Weight of the uniform distribution in the parts' labels during the
            first epochs.
        smoothing_epochs: Epochs at the start in which the parts' labels do not depend on
            the agreement.
        triplet_weight: Weight of the softmax triplet loss; 0 for none.
        global_distance_weight: Weight of the global distance in the test distance; the rest
            is that of the parts. With 1 only the global feature is tested, as in the paper.

    Raises:
        ValueError: If there are no parts.
    """

    needs_clusters = True
    default_sampler = "pk_camera"

    agreement: Tensor

    def __init__(
        self,
        num_images: int,
        global_dim: int,
        num_parts: int = 0,
        part_dim: int = 0,
        *,
        temperature: Annotated[float, Interval(0, above=True)] = 0.05,
        bank_momentum: Annotated[float, Interval(0, 1)] = 0.1,
        cluster_update: Annotated[str, Choice(("mean", "hard"))] = "mean",
        num_agreement_neighbors: Annotated[int, Interval(1)] = 20,
        part_weight: Annotated[float, Interval(0, 1)] = 0.5,
        label_smoothing: Annotated[float, Interval(0, 1)] = 0.1,
        smoothing_epochs: Annotated[int, Interval(0)] = 5,
        triplet_weight: Annotated[float, Interval(0)] = 1.0,
        global_distance_weight: Annotated[float, Interval(0, 1)] = 1.0,
    ) -> None:
        super().__init__(num_images, global_dim, num_parts, part_dim)
        if num_parts < 1:
            raise ValueError(
                f"PPLR refines labels with parts and got num_parts={num_parts}: set "
                "MODEL.SELCON.NUM_PARTS to 1 or more, with a backbone that returns a "
                "feature map"
            )
        self.temperature = temperature
        self.num_agreement_neighbors = num_agreement_neighbors
        self.part_weight = part_weight
        self.label_smoothing = label_smoothing
        self.smoothing_epochs = smoothing_epochs
        self.triplet_weight = triplet_weight
        self.global_distance_weight = global_distance_weight
        self.memory, self.part_memory = (
            ClusterMemory(
                torch.zeros(0, dim),
                momentum=bank_momentum,
                update=cluster_update,  # type: ignore[arg-type]
            )
            for dim in (global_dim, part_dim)
        )
        self.register_buffer("agreement", torch.zeros(num_images, num_parts))

    def _part_rows(self, targets: Tensor) -> Tensor:
        """Return rows of the part memory: all parts of cluster 0, then of cluster 1, ..."""
        parts = torch.arange(self.num_parts, device=targets.device)
        rows = targets[:, None] * self.num_parts + parts
        return torch.where(targets[:, None] < 0, -1, rows).flatten()

    @staticmethod
    def _parts(embeddings: Embeddings) -> Tensor:
        if embeddings.part_features is None:
            raise ValueError("PPLR needs part features, and the embeddings have none")
        return embeddings.part_features

    @torch.no_grad()
    def prepare(
        self,
        embeddings: Embeddings,
        camids: Tensor | None,
        pseudo_labels: PseudoLabels | None = None,
    ) -> None:
        """Keep the labels, rebuild the memories, measure the cross agreement."""
        self._set_labels(pseudo_labels)
        global_features, part_features = embeddings.global_features, self._parts(embeddings)
        self.memory.reset(cluster_means(global_features, self.labels))
        rows = self._part_rows(self.labels)
        self.part_memory.reset(cluster_means(part_features.flatten(0, 1), rows))
        agreement = cross_agreement(
            global_features, part_features, num_neighbors=self.num_agreement_neighbors
        )
        self.agreement.copy_(agreement)
        self._finish_prepare()

    def _logits(self, embeddings: Embeddings) -> tuple[Tensor, Tensor]:
        """Compare a batch with all clusters: ``(B, clusters)``, ``(B, S, clusters)``."""
        unit = F.normalize(embeddings.global_features.float(), dim=1)
        unit_parts = F.normalize(self._parts(embeddings).float(), dim=2)
        bank = self.part_memory.bank.view(-1, self.num_parts, self.part_dim)
        with torch.autocast(device_type=unit.device.type, enabled=False):
            part_similarity = torch.einsum("bsd,ksd->bsk", unit_parts, bank)
        similarity = bank_product(unit, self.memory.bank)
        return similarity / self.temperature, part_similarity / self.temperature

    def loss(
        self,
        embeddings: Embeddings,
        index: Tensor,
        camids: Tensor | None,
        *views: Embeddings,
    ) -> dict[str, Tensor]:
        """Train the global feature with refined labels and the parts with smoothed ones."""
        targets, agreement = self.labels[index], self.agreement[index]
        inside = targets >= 0
        logits, part_logits = self._logits(embeddings)
        count = inside.sum().clamp(min=1)
        own = targets.clamp(min=0)  # outliers are in the shapes, but not in the sums
        refined = refined_targets(own, part_logits, agreement, part_weight=self.part_weight)
        global_losses = F.cross_entropy(logits, refined, reduction="none")
        part_losses = self._part_losses(part_logits, own, agreement).mean(dim=1)
        losses = {
            "loss_global": (global_losses * inside).sum() / count,
            "loss_part": (part_losses * inside).sum() / count,
        }
        if self.triplet_weight:
            losses["loss_triplet"] = self.triplet_weight * softmax_triplet_loss(
                embeddings.global_features, targets, temperature=self.temperature
            )
        return losses

    def _part_losses(self, logits: Tensor, targets: Tensor, agreement: Tensor) -> Tensor:
        if self.epoch >= self.smoothing_epochs:
            return agreement_smoothed_loss(logits, targets, agreement)
        return F.cross_entropy(
            logits.transpose(1, 2),
            targets[:, None].expand(-1, self.num_parts),
            reduction="none",
            label_smoothing=self.label_smoothing,
        )

    @torch.no_grad()
    def update(self, index: Tensor, embeddings: Embeddings) -> None:
        """Write the batch of all ranks into both memories."""
        targets = self.labels[gather_batch(index)]
        features = gather_batch(embeddings.global_features.detach().float())
        part_features = gather_batch(self._parts(embeddings).detach().float())
        self.memory.update(features, targets)
        self.part_memory.update(part_features.flatten(0, 1), self._part_rows(targets))
        self._finish_update()

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float]:
        """Report ``cross_agreement``, its mean over all images and parts."""
        return {"cross_agreement": self.agreement.mean().item()}
