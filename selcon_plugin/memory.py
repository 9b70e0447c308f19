"""Memory banks: one unit vector per training image or cluster, written once per step.

A bank is read by the loss as a constant and written after the optimiser step, under
``no_grad``; nothing here takes part in a backward pass. Every bank is a persistent buffer,
so that a checkpoint holds it.

Shape shorthand in this module:

    B: images in the batch
    M: training images; a bank over images has a row for each
    C: global feature dimension
    S: parts; D: part feature dimension, S * D == C
    K: neighbours; an image has 1 + K positives
    T: single-row writes
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MixtureUpdate = Literal["positives", "self"]
ClusterUpdate = Literal["mean", "hard", "batch_mean"]


def _run_starts(ordered: Tensor) -> Tensor:
    """Return which entries of a sorted ``(T,)`` begin a run of equal ones."""
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    return starts


def _write_rounds(rows: Tensor) -> list[Tensor]:
    """Split an ordered list of writes into rounds in which no row occurs twice.

    Round r holds the r-th write of every row, so that the writes of one row keep their
    order.

    Args:
        rows: Written row of each write, in order, shape ``(T,)``.

    Returns:
        Positions into ``rows``, one tensor per round.
    """
    order = torch.argsort(rows, stable=True)
    ordered = rows[order]
    position = torch.arange(len(rows), device=rows.device)
    # Position of the first write of the same row, carried forward.
    first = torch.where(_run_starts(ordered), position, 0).cummax(dim=0).values
    occurrence = position - first
    by_round = torch.argsort(occurrence, stable=True)
    sizes: list[int] = torch.bincount(occurrence).tolist()  # the only synchronisation
    return list(torch.split(order[by_round], sizes))


@torch.no_grad()
def write_rows(
    bank: Tensor, rows: Tensor, features: Tensor, source: Tensor, *, momentum: float
) -> None:
    """Move bank rows towards features, one write after the other.

    Write t does ``bank[r] ← normalize(momentum · bank[r] + (1 - momentum) · f)`` with
    ``r = rows[t]`` and ``f = features[source[t]]``. A row that occurs several times is
    written several times, in the order given; the result equals a Python loop over the
    writes, but takes as many tensor operations as the most frequent row has writes.

    Args:
        bank: Written in place, shape ``(M, ..., C)``; vectors lie along the last axis.
        rows: Row of each write, int64, shape ``(T,)``.
        features: Shape ``(number of features, ..., C)``.
        source: Feature of each write, int64, shape ``(T,)``.
        momentum: Weight of the old row, in [0, 1].
    """
    if not len(rows):
        return
    for positions in _write_rounds(rows):
        targets = rows[positions]
        new = features[source[positions]].float()
        mixed = torch.lerp(new, bank[targets].float(), momentum)
        bank[targets] = F.normalize(mixed, dim=-1).to(bank.dtype)


class TriBankMemory(nn.Module):
    """Global, part and mixture bank of Selective Contrastive Learning.

    Global and part bank follow the images' own features and rank the neighbours. The
    mixture bank is what the loss compares with: it blends global vectors and concatenated
    part vectors of an image and, with ``mixture_update="positives"``, of every image that
    chose it as a neighbour, so that a row drifts towards the centre of its neighbourhood.
    It starts at zero.

    Args:
        num_images: Bank rows M, one per training image.
        global_dim: Global feature dimension C.
        num_parts: Parts S; 0 means no part bank (``part_bank`` is None).
        part_dim: Part feature dimension D.
        momentum: Weight of the old row in every write, in [0, 1].
        mixture_update: ``"positives"`` writes an image's features into the mixture rows of
            all its positives, ``"self"`` only into its own.
        normalize_parts: Whether the concatenated parts (norm √S) are scaled to unit length
            before they enter the mixture bank. The released code does not.
        dtype: float32, float16 or bfloat16; half precision halves the memory.

    Attributes:
        global_bank: Shape ``(M, C)``.
        part_bank: Shape ``(M, S, D)`` or None.
        mixture_bank: Shape ``(M, C)``.

    Raises:
        ValueError: If ``S * D != C`` (with parts), ``momentum`` is outside [0, 1] or
            ``mixture_update`` is unknown.
    """

    global_bank: Tensor
    part_bank: Tensor | None
    mixture_bank: Tensor

    def __init__(
        self,
        num_images: int,
        global_dim: int,
        num_parts: int,
        part_dim: int,
        *,
        momentum: float = 0.5,
        mixture_update: MixtureUpdate = "positives",
        normalize_parts: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if num_parts and num_parts * part_dim != global_dim:
            raise ValueError(
                f"the concatenated parts ({num_parts} x {part_dim}) must be as long as "
                f"the global feature ({global_dim}), since both are blended into one "
                "mixture bank"
            )
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
        if mixture_update not in ("positives", "self"):
            raise ValueError(
                f"mixture_update must be 'positives' or 'self', got {mixture_update!r}"
            )
        self.momentum = momentum
        self.mixture_update = mixture_update
        self.normalize_parts = normalize_parts
        self.register_buffer(
            "global_bank", torch.zeros(num_images, global_dim, dtype=dtype)
        )
        parts = (
            torch.zeros(num_images, num_parts, part_dim, dtype=dtype) if num_parts else None
        )
        self.register_buffer("part_bank", parts)
        self.register_buffer(
            "mixture_bank", torch.zeros(num_images, global_dim, dtype=dtype)
        )

    def extra_repr(self) -> str:
        """Describe sizes and settings in ``print(model)``."""
        rows, dim = self.global_bank.shape
        parts = 0 if self.part_bank is None else self.part_bank.shape[1]
        return (
            f"num_images={rows}, global_dim={dim}, num_parts={parts}, "
            f"momentum={self.momentum}, mixture_update={self.mixture_update!r}, "
            f"dtype={self.global_bank.dtype}"
        )

    @torch.no_grad()
    def initialize(self, global_features: Tensor, part_features: Tensor | None) -> None:
        """Fill the ranking banks with all images' features; empty the mixture bank.

        Args:
            global_features: Unit vectors of images 0..M-1, shape ``(M, C)``.
            part_features: Unit vectors, shape ``(M, S, D)``, or None without parts.
        """
        self._fill("global", self.global_bank, global_features)
        if self.part_bank is not None:
            self._fill("part", self.part_bank, part_features)
        self.mixture_bank.zero_()

    @staticmethod
    def _fill(name: str, bank: Tensor, features: Tensor | None) -> None:
        if features is None or features.shape != bank.shape:
            got = None if features is None else tuple(features.shape)
            raise ValueError(f"{name} features must be {tuple(bank.shape)}, got {got}")
        bank.copy_(features)

    def concatenate_parts(self, part_features: Tensor) -> Tensor:
        """Join the part vectors as they enter loss and mixture bank.

        Args:
            part_features: Unit vectors, shape ``(B, S, D)``.

        Returns:
            Shape ``(B, S*D)``: norm √S, or 1 with ``normalize_parts``.
        """
        joined = part_features.flatten(1)
        if self.normalize_parts:
            joined = joined / part_features.shape[1] ** 0.5
        return joined

    @torch.no_grad()
    def update(
        self,
        index: Tensor,
        global_features: Tensor,
        part_features: Tensor | None,
        positive_index: Tensor,
        positive_mask: Tensor | None = None,
    ) -> None:
        """Write a batch into the three banks; call once, after the optimiser step.

        The ranking banks get each image's own features. The mixture bank is written in the
        order of the released code: first with the concatenated parts, then with the global
        features; inside each from the last positive column to column 0; inside each column
        in batch order. An image that occurs twice in the batch is written twice.

        Args:
            index: Own row of each image, int64, shape ``(B,)``.
            global_features: Unit vectors, shape ``(B, C)``.
            part_features: Unit vectors, shape ``(B, S, D)``, or None without parts.
            positive_index: Rows of the positives, column 0 the own row, shape ``(B, 1 +
                K)``.
            positive_mask: False where a positive is absent and nothing is written, bool
                ``(B, 1 + K)``; None if none is absent.
        """
        own = torch.arange(len(index), device=index.device)
        write_rows(self.global_bank, index, global_features, own, momentum=self.momentum)
        sources = [global_features]
        if self.part_bank is not None and part_features is not None:
            write_rows(self.part_bank, index, part_features, own, momentum=self.momentum)
            sources.insert(0, self.concatenate_parts(part_features))
        columns = positive_index if self.mixture_update == "positives" else index[:, None]
        batch_size, num_columns = columns.shape
        rows = columns.flip(1).T.flatten().repeat(len(sources))  # columns K..0, batch order
        # Features are stacked parts first; writes of branch k read rows k*B .. k*B + B - 1.
        branch = torch.arange(len(sources), device=index.device)[:, None, None] * batch_size
        source = (branch + own.expand(1, num_columns, -1)).flatten()
        if positive_mask is not None and self.mixture_update == "positives":
            present = positive_mask.flip(1).T.flatten().repeat(len(sources))
            rows, source = rows[present], source[present]
        write_rows(
            self.mixture_bank, rows, torch.cat(sources), source, momentum=self.momentum
        )


def _sum_rows(features: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Add up the features of each row, always in the same order.

    Args:
        features: Shape ``(T, C)``.
        rows: Row of each feature, int64, shape ``(T,)``.
        num_rows: Rows of the result.

    Returns:
        Float32 sums, shape ``(num_rows, C)``.
    """
    features = features.float()
    sums = features.new_zeros(num_rows, features.shape[1])
    if features.is_cuda:
        # index_add_ would add in any order there, and banks that must be equal on every
        # process would differ in the last bits. This one sorts.
        return sums.index_put_((rows,), features, accumulate=True)
    return sums.index_add_(0, rows, features)


@torch.no_grad()
def cluster_means(features: Tensor, labels: Tensor, *, normalize: bool = True) -> Tensor:
    """Average the features of each cluster and scale the means to unit length.

    Args:
        features: Unit vectors of all images, shape ``(M, C)``.
        labels: Cluster of each image, int64, shape ``(M,)``, on any device; -1 for an
            outlier, which is left out.
        normalize: False leaves the means as they are: the inner product with one is then
            the mean of the products with its members.

    Returns:
        Float32 unit vectors, shape ``(num_clusters, C)``, on the device of ``features``; a
        number that no image has gives a zero row.

    Raises:
        ValueError: If there is not one label for each feature.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> cluster_means(features, torch.tensor([0, 1, -1])).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    if labels.shape != features.shape[:1]:
        raise ValueError(
            f"labels must hold one label for each of the {len(features)} features, got "
            f"shape {tuple(labels.shape)}"
        )
    num_clusters = int(labels.max()) + 1 if len(labels) else 0
    # Outliers go to a row of their own, which is cut off: no copy of the features.
    rows = torch.where(labels < 0, num_clusters, labels).to(features.device)
    sums = _sum_rows(features, rows, num_clusters + 1)[:num_clusters]
    if normalize:
        return F.normalize(sums, dim=1)
    counts = torch.bincount(rows, minlength=num_clusters + 1)[:num_clusters]
    return sums / counts.clamp(min=1)[:, None]


class ClusterMemory(nn.Module):
    """One vector per cluster, rebuilt whenever the images are clustered anew.

    A written row becomes ``normalize(momentum · row + (1 - momentum) · f)``. What f is, and
    how often a row is written in a step, is the ``update``:

    * ``"mean"``: every image of the batch, one after the other in batch order (Cluster
      Contrast).
    * ``"hard"``: once per cluster, its image of the batch that is least similar to the row
      as it was before the step; of several, the first (Cluster Contrast, HHCL).
    * ``"batch_mean"``: once per cluster, the mean of its unit vectors in the batch, not
      scaled again (HHCL).

    The number of clusters may change: :meth:`reset` takes any, and a loaded checkpoint
    brings its own.

    Args:
        features: First rows, shape ``(num_clusters, C)``, scaled to unit length here. No
            clusters, ``(0, C)``, before the first clustering.
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
                f"{tuple(features.shape)}; without clusters pass torch.empty(0, C)"
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
            ValueError: If the vectors are not as long as those of the bank.
        """
        dim = self.bank.shape[1]
        if features.dim() != 2 or features.shape[1] != dim:
            raise ValueError(
                f"features must be (num_clusters, {dim}), got {tuple(features.shape)}"
            )
        self.bank = F.normalize(features.float(), dim=1).to(self.bank)

    @torch.no_grad()
    def update(self, features: Tensor, targets: Tensor) -> None:
        """Write a batch into the bank; call once, after the optimiser step.

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
        """Return, for each cluster present, its image least similar to its row."""
        similarity = (unit * self.bank[rows]).sum(dim=1)
        order = torch.argsort(similarity, stable=True)
        order = order[torch.argsort(rows[order], stable=True)]  # by cluster, hardest first
        return order[_run_starts(rows[order])]

    @staticmethod
    def _batch_means(rows: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Return the clusters present and the mean of each one's unit vectors."""
        present, place, counts = torch.unique(rows, return_inverse=True, return_counts=True)
        return present, _sum_rows(unit, place, len(present)) / counts[:, None]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        # The clusters of a checkpoint are as many as its epoch had. Vectors of another
        # length are another network's: those PyTorch refuses itself.
        loaded = state_dict.get(prefix + "bank")
        if loaded is not None and loaded.shape[1:] == self.bank.shape[1:]:
            self.bank = self.bank.new_empty(loaded.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


class InstanceMemory(nn.Module):
    """One vector per training image, written with the image's own features.

    A written row becomes ``normalize(momentum · row + (1 - momentum) · f)``; an image that
    occurs twice in a batch is written twice, in batch order.

    Args:
        num_images: Bank rows M.
        dim: Feature dimension C.
        momentum: Weight of the old row, in [0, 1].

    Attributes:
        bank: Float32, shape ``(M, C)``; zero before :meth:`fill`.

    Raises:
        ValueError: If ``momentum`` is outside [0, 1].
    """

    bank: Tensor

    def __init__(self, num_images: int, dim: int, *, momentum: float = 0.2) -> None:
        super().__init__()
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
        self.momentum = momentum
        self.register_buffer("bank", torch.zeros(num_images, dim))

    def extra_repr(self) -> str:
        """Describe sizes and settings in ``print(model)``."""
        rows, dim = self.bank.shape
        return f"num_images={rows}, dim={dim}, momentum={self.momentum}"

    @torch.no_grad()
    def fill(self, features: Tensor) -> None:
        """Replace all rows.

        Args:
            features: Features of images 0..M-1, shape ``(M, C)``; scaled to unit length
                here.

        Raises:
            ValueError: If the shape is another.
        """
        if features.shape != self.bank.shape:
            raise ValueError(
                f"features must be {tuple(self.bank.shape)}, got {tuple(features.shape)}"
            )
        self.bank.copy_(F.normalize(features.float(), dim=1))

    @torch.no_grad()
    def update(self, index: Tensor, features: Tensor) -> None:
        """Write a batch into the bank; call once, after the optimiser step.

        Args:
            index: Row of each image, int64, shape ``(B,)``.
            features: Shape ``(B, C)``; scaled to unit length here.
        """
        unit = F.normalize(features.float(), dim=1)
        in_order = torch.arange(len(index), device=index.device)
        write_rows(self.bank, index, unit, in_order, momentum=self.momentum)
