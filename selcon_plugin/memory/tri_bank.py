"""``TriBankMemory``: a global, a part and a mixture bank, one row per training image."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from selcon_plugin.memory.writes import write_rows

MixtureUpdate = Literal["positives", "self"]


class TriBankMemory(nn.Module):
    """Global, part and mixture bank of Selective Contrastive Learning.

    The global and the part bank follow the images' own features and rank the neighbors. The
    loss compares features with the mixture bank. It blends global vectors and concatenated
    part vectors of an image and, with ``mixture_update="positives"``, of every image that
    selected it as a neighbor, so that a row moves towards the center of its neighborhood.
    The mixture bank starts at zero.

    Args:
        num_images: Bank rows M, one per training image.
        global_dim: Global feature dimension C.
        num_parts: Parts S; with 0 there is no part bank (``part_bank`` is None).
        part_dim: Part feature dimension D.
        momentum: Weight of the old row in every write, in [0, 1].
        mixture_update: ``"positives"`` writes an image's features into the mixture rows of
            all its positives, ``"self"`` only into its own.
        normalize_parts: Whether the concatenated parts (norm √S) are scaled to unit length
            before they enter the mixture bank. The released code does not scale them.
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
                f"the concatenated parts ({num_parts} x {part_dim}) must have the "
                f"dimension of the global feature ({global_dim}), because both are blended "
                "into one mixture bank"
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
        """Fill the ranking banks with all images' features, and zero the mixture bank.

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
        """Concatenate the part vectors as loss and mixture bank use them.

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
        """Write a batch into the three banks; call this once, after the optimizer step.

        The ranking banks get each image's own features. The mixture bank is written in the
        order of the released code: first with the concatenated parts, then with the global
        features; for each of the two from the last positive column to column 0; and within
        a column in batch order. An image that occurs twice in the batch is written twice.

        Args:
            index: Own row of each image, int64, shape ``(B,)``.
            global_features: Unit vectors, shape ``(B, C)``.
            part_features: Unit vectors, shape ``(B, S, D)``, or None without parts.
            positive_index: Rows of the positives, column 0 the own row, shape ``(B, 1 +
                K)``.
            positive_mask: False where a positive is absent, so that nothing is written,
                bool ``(B, 1 + K)``; None if none is absent.
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
        # The features are stacked, parts first: branch k reads rows k*B .. k*B + B - 1.
        branch = torch.arange(len(sources), device=index.device)[:, None, None] * batch_size
        source = (branch + own.expand(1, num_columns, -1)).flatten()
        if positive_mask is not None and self.mixture_update == "positives":
            present = positive_mask.flip(1).T.flatten().repeat(len(sources))
            rows, source = rows[present], source[present]
        write_rows(
            self.mixture_bank, rows, torch.cat(sources), source, momentum=self.momentum
        )
