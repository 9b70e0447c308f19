"""Features of random images."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def units(*shape: int, seed: int = 0) -> Tensor:
    """Return unit vectors in random directions along the last axis."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def units_of(dim: int) -> Callable[..., Tensor]:
    """Return ``units(count, *, seed)`` for features of a fixed dimension."""

    def rows(count: int, *, seed: int) -> Tensor:
        return units(count, dim, seed=seed)

    return rows
