"""``ClusterMemory``: a bank with one row per cluster."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selcon_plugin.memory.writes import run_starts, sum_rows, write_rows

ClusterUpdate = Literal["mean", "hard", "batch_mean"]


class ClusterMemory(nn.Module):
    """Bank of one vector per cluster, rebuilt after every clustering.

    A written row becomes ``normalize(momentum · row + (1 - momentum) · f)``. ``update``
    selects f, and with it how often a row is written in a step:

    * ``"mean"``: every image of the batch, one after the other in batch order (Cluster
      Contrast).
    * ``"hard"``: once per cluster, its image of the batch that is least similar to the row
      before the step; of several, the first (Cluster Contrast, HHCL).
    * ``"batch_mean"``: once per cluster, the mean of its unit vectors in the batch, not
      scaled again (HHCL).

    The number of clusters may change: :meth:`reset` accepts any number, and a loaded
    checkpoint has its own.

    Args:
        features: First rows, shape ``(num_clusters, C)``, scaled to unit length here;
            ``(0, C)`` before the first clustering.
        momentum: Weight of the old row, in [0, 1].
        update: ``"mean"``, ``"hard"`` or ``"batch_mean"``.

    Attributes:
        bank: Float32, shape ``(num_clusters, C)``.

    Raises:
        ValueError: If ``features`` is not a matrix, ``momentum`` is outside [0, 1] or
            ``update`` is unknown.

    References:
        Dai et al., "Cluster Contrast for Unsupervised Person Re-Identification", 2022.
        https://arxiv.org/abs/2103.11568

        Hu et al., "Hard-sample Guided Hybrid Contrast Learning for Unsupervised Person
        Re-Identification", 2021. https://arxiv.org/abs/2109.12333
    """

    bank: Tensor

    def __init__(
        self, features: Tensor, *, momentum: float = 0.2, update: ClusterUpdate = "mean"
    ) -> None:
        super().__init__()
        if features.dim() != 2:
            raise ValueError(
                "features must be (num_clusters, C), got shape "
                f"{tuple(features.shape)}. Without clusters pass torch.empty(0, C)"
            )
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
        if update not in get_args(ClusterUpdate):
            raise ValueError(
                f"update must be one of {', '.join(get_args(ClusterUpdate))}, got "
                f"{update!r}"
            )
        self.momentum = momentum
        self.update_mode = update
        self.register_buffer("bank", F.normalize(features.detach().float(), dim=1))

    def extra_repr(self) -> str:
        """Describe sizes and settings in ``print(model)``."""
        rows, dim = self.bank.shape
        return (
            f"num_clusters={rows}, dim={dim}, momentum={self.momentum}, "
            f"update={self.update_mode!r}"
        )

    @torch.no_grad()
    def reset(self, features: Tensor) -> None:
        """Replace the bank, for instance by the :func:`cluster_means` of new clusters.

        Args:
            features: Shape ``(new number of clusters, C)``; scaled to unit length here.

        Raises:
            ValueError: If the vectors have another dimension than those of the bank.
        """
        dim = self.bank.shape[1]
        if features.dim() != 2 or features.shape[1] != dim:
            raise ValueError(
                f"features must be (num_clusters, {dim}), got {tuple(features.shape)}"
            )
        self.bank = F.normalize(features.float(), dim=1).to(self.bank)

    @torch.no_grad()
    def update(self, features: Tensor, targets: Tensor) -> None:
        """Write a batch into the bank; call this once, after the optimizer step.

        Args:
            features: Shape ``(B, C)``; scaled to unit length here.
            targets: Cluster of each image, int64, shape ``(B,)``; -1 for an outlier, which
                writes nothing.

        Raises:
            ValueError: If there is not one target for each feature.
        """
        if targets.shape != features.shape[:1]:
            raise ValueError(
                f"targets must hold one cluster for each of the {len(features)} features, "
                f"got shape {tuple(targets.shape)}"
            )
        clustered = (targets >= 0).nonzero().squeeze(1)
        rows = targets[clustered]
        unit = F.normalize(features[clustered].float(), dim=1)
        if self.update_mode == "hard":
            hardest = self._hardest(rows, unit)
            rows, unit = rows[hardest], unit[hardest]
        elif self.update_mode == "batch_mean":
            rows, unit = self._batch_means(rows, unit)
        in_order = torch.arange(len(rows), device=rows.device)
        write_rows(self.bank, rows, unit, in_order, momentum=self.momentum)

    def _hardest(self, rows: Tensor, unit: Tensor) -> Tensor:
        """Return, for each cluster in the batch, the image least similar to its row."""
        similarity = (unit * self.bank[rows]).sum(dim=1)
        order = torch.argsort(similarity, stable=True)
        order = order[torch.argsort(rows[order], stable=True)]  # by cluster, hardest first
        return order[run_starts(rows[order])]

    @staticmethod
    def _batch_means(rows: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Return the clusters in the batch and the mean of each one's unit vectors."""
        present, place, counts = torch.unique(rows, return_inverse=True, return_counts=True)
        return present, sum_rows(unit, place, len(present)) / counts[:, None]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        # The number of clusters in a checkpoint is that of its epoch. Vectors of another
        # dimension belong to another network, and PyTorch itself refuses them.
        loaded = state_dict.get(prefix + "bank")
        if loaded is not None and loaded.shape[1:] == self.bank.shape[1:]:
            self.bank = self.bank.new_empty(loaded.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
