"""``InstanceMemory``: a bank with one row per training image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selcon_plugin.memory.writes import write_rows


class InstanceMemory(nn.Module):
    """Bank of one vector per training image, written with the image's own features.

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
            ValueError: If the shape is not that of the bank.
        """
        if features.shape != self.bank.shape:
            raise ValueError(
                f"features must be {tuple(self.bank.shape)}, got {tuple(features.shape)}"
            )
        self.bank.copy_(F.normalize(features.float(), dim=1))

    @torch.no_grad()
    def update(self, index: Tensor, features: Tensor) -> None:
        """Write a batch into the bank; call this once, after the optimizer step.

        Args:
            index: Row of each image, int64, shape ``(B,)``.
            features: Shape ``(B, C)``; scaled to unit length here.
        """
        unit = F.normalize(features.float(), dim=1)
        in_order = torch.arange(len(index), device=index.device)
        write_rows(self.bank, index, unit, in_order, momentum=self.momentum)
