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


def people_with(images: int, people: int, *, noise: float = 1.0, seed: int = 0) -> Tensor:
    """Features of people with as many images each, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    centers = F.normalize(torch.randn(people, 64, generator=generator), dim=1)
    features = centers.repeat_interleave(images, dim=0)
    features = features + noise / 8 * torch.randn(features.shape, generator=generator)
    return F.normalize(features, dim=1)
