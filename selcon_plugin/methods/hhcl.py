"""HHCL: hard-sample guided hybrid contrast, in its two released forms.

Hu et al., "Hard-sample Guided Hybrid Contrast Learning for Unsupervised Person
Re-Identification", IC-NIDC 2021. https://arxiv.org/abs/2109.12333

Shape shorthand in this module:

    K: clusters
    S: instance slots of a cluster
    C: feature dimension
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from selcon_plugin.features import Embeddings
from selcon_plugin.losses import instance_contrastive_loss
from selcon_plugin.memory.cluster import ClusterMemory
from selcon_plugin.memory.writes import cluster_means
from selcon_plugin.methods.base import register_method
from selcon_plugin.methods.cluster_method import ClusterMethod
from selcon_plugin.options import Choice, Interval


@register_method("HHCL")
class HHCL(ClusterMethod):
    r"""Hard-sample guided hybrid contrast.

    There are two banks, each with an InfoNCE loss over all clusters, and the loss is the
    mean of both. One bank follows the mean of a cluster's images in the batch; the other
    contains hard ones:

    * ``form="prototypes"``: there is one more row per cluster, which follows its image of
      the batch that is least similar to it. Both rows start as the cluster's mean.
    * ``form="instances"`` ("v2" in the release): there are S slots per cluster, overwritten
      with its images of the batch. The logit of the own cluster is the smallest over its
      slots, that of every other cluster the largest over its slots.

    With one image of each cluster in the batches, the first form is Cluster Contrast.

    Slots start an epoch with images of the cluster. With n images for S slots, here or in a
    batch, slot s takes image number :math:`\lfloor s n / S \rfloor`: each image once if
    n = S, and some repeatedly if n < S.

    The release of the first form has a misplaced bracket, which halves the mean loss.

    Args:
        num_images: Training images M.
        global_dim: Global feature dimension C.
        num_parts: Not used.
        part_dim: Not used.
        form: Second bank of a cluster beside the mean row: ``"prototypes"`` for a row that
            follows its hardest image of the batch; ``"instances"`` for slots that hold its
            images of the batch.
        instance_slots: S, slots per cluster, usually the number of a cluster's images in a
            batch. Only ``"instances"`` has them.
        released_weights: Whether the hard and the mean loss have the weights 0.5 and 0.25
            of the release instead of 0.5 and 0.5. Only for ``"prototypes"``.
        temperature: τ, by which similarities are divided.
        bank_momentum: Weight of the old row when a prototype is written.
        **options: Those of :class:`ClusterMethod`. The focal factor does not apply to the
            slots.

    Raises:
        ValueError: If ``released_weights`` is set with ``"instances"``.
    """

    def __init__(
        self,
        num_images: int,
        global_dim: int,
        num_parts: int = 0,
        part_dim: int = 0,
        *,
        form: Annotated[str, Choice(("prototypes", "instances"))] = "prototypes",
        instance_slots: Annotated[int, Interval(1)] = 16,
        released_weights: bool = False,
        temperature: Annotated[float, Interval(0, above=True)] = 0.05,
        bank_momentum: Annotated[float, Interval(0, 1)] = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(num_images, global_dim, num_parts, part_dim, **options)
        if released_weights and form == "instances":
            raise ValueError(
                "released_weights are those of form 'prototypes'; form 'instances' has no "
                "others than 0.5 and 0.5: leave released_weights out"
            )
        self.form = form
        self.instance_slots = instance_slots
        self.mean_weight = 0.25 if released_weights else 0.5
        self.temperature = temperature
        empty = torch.zeros(0, global_dim)
        self.mean_memory = ClusterMemory(empty, momentum=bank_momentum, update="batch_mean")
        if form == "prototypes":
            self.hard_memory = ClusterMemory(empty, momentum=bank_momentum, update="hard")
        else:
            # Row k * S + s is slot s of cluster k.
            self.slots = ClusterMemory(empty, momentum=0.0)

    @property
    def _num_slots(self) -> int:
        # If every image is its own class, S slots would be S copies of the data set.
        return 1 if self.instance_level else self.instance_slots

    def _rebuild(self, features: Tensor, labels: Tensor) -> None:
        means = cluster_means(features, labels)
        self.mean_memory.reset(means)
        if self.form == "prototypes":
            self.hard_memory.reset(means)
        else:
            _, images = fill_slots(labels, self._num_slots)  # of all clusters, in order
            self.slots.reset(features[images])

    def loss(
        self,
        embeddings: Embeddings,
        index: Tensor,
        camids: Tensor | None,
        *views: Embeddings,
    ) -> dict[str, Tensor]:
        """Contrast every sample with the clusters' means and with their hard instances."""
        features = embeddings.global_features
        batch = (index, camids)
        mean = self._contrast(
            features, self.mean_memory.bank, *batch, temperature=self.temperature
        )
        if self.form == "prototypes":
            hard = self._contrast(
                features, self.hard_memory.bank, *batch, temperature=self.temperature
            )
        else:
            hard = self._contrast_slots(features, *batch)
        return {"loss_hard": 0.5 * hard, "loss_mean": self.mean_weight * mean}

    def _contrast_slots(
        self, features: Tensor, index: Tensor, camids: Tensor | None
    ) -> Tensor:
        slots = self.slots.bank
        targets = self.labels[index]
        return instance_contrastive_loss(
            features,
            slots,
            torch.arange(len(slots), device=slots.device) // self._num_slots,
            targets,
            temperature=self.temperature,
            own="min",
            others="max",
            sample_weight=self.camera_weighting(index, targets, camids),
        )

    def _write(self, index: Tensor, features: Tensor, targets: Tensor) -> None:
        self.mean_memory.update(features, targets)
        if self.form == "prototypes":
            self.hard_memory.update(features, targets)
        else:
            rows, images = fill_slots(targets, self._num_slots)
            self.slots.update(features[images], rows)


def fill_slots(labels: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Choose an image for each slot of a cluster.

    Of the n images of a cluster, in the given order, slot s takes number ⌊s n / S⌋.

    Args:
        labels: Cluster of each image, int64 ``(B,)``; -1 for an outlier, which has no slot.
        num_slots: Slots S of each cluster.

    Returns:
        ``rows``, with k * S + s for slot s of cluster k, and ``images``, the index in
        ``labels`` of the image for each row; both int64 ``(clusters present * S,)``, in the
        order of ``rows``.

    Example:
        >>> rows, images = fill_slots(torch.tensor([2, 0, 2, -1]), num_slots=2)
        >>> rows.tolist(), images.tolist()
        ([0, 1, 4, 5], [1, 1, 0, 2])
    """
    present, counts = torch.unique(labels[labels >= 0], return_counts=True)
    # The order is by cluster, then by position, with all outliers at the end.
    far = torch.iinfo(labels.dtype).max
    order = torch.argsort(torch.where(labels < 0, far, labels), stable=True)
    slot = torch.arange(num_slots, device=labels.device)
    first = counts.cumsum(0) - counts
    places = first[:, None] + slot * counts[:, None] // num_slots
    rows = present[:, None] * num_slots + slot
    return rows.flatten(), order[places.flatten()]
