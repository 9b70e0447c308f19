"""``PillowResize``: Pillow's resizing as a layer of a network."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

Interpolation = Literal["bilinear", "bicubic"]


PILLOW_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


class PillowResize(nn.Module):
    """Pillow's resizing as matrix products, for graphs that run without Python.

    There is one pass per axis, in the order of the installed Pillow, and each is rounded to
    whole gray levels as in Pillow. Pillow computes with fixed-point weights: a sum close to
    a half may be rounded the other way, so that single pixels differ by one level.

    Args:
        size: Height and width to resize to.
        interpolation: Filter.
    """

    def __init__(self, size: Sequence[int], interpolation: Interpolation) -> None:
        super().__init__()
        self.height, self.width = size
        self.interpolation = interpolation
        self.reach = 1.0 if interpolation == "bilinear" else 2.0
        self.chooses_order = _pillow_chooses_order()

    def forward(self, pixels: Tensor) -> Tensor:
        """Resize a batch.

        Args:
            pixels: Values 0..255, shape ``(B, h, w, 3)``, for any h and w.

        Returns:
            Whole numbers 0..255 in float32, shape ``(B, 3, height, width)``.
        """
        images = pixels.permute(0, 3, 1, 2).float()
        # One 1 per pixel of an axis: the length stays variable when this is traced.
        column = torch.ones_like(pixels[0, :, 0, 0], dtype=torch.float32)
        row = torch.ones_like(pixels[0, 0, :, 0], dtype=torch.float32)
        down = self._weights(column, self.height)
        across = self._weights(row, self.width).transpose(0, 1)
        resized = _rounded(down @ _rounded(images @ across))
        if not self.chooses_order:
            return resized
        height, width = column.sum(), row.sum()
        down_first = (height > self.height) & (width * self.height < height * self.width)
        return torch.where(down_first, _rounded(_rounded(down @ images) @ across), resized)

    def _weights(self, line: Tensor, size: int) -> Tensor:
        """Return the weight of each input pixel in each output pixel, ``(size, axis)``."""
        places = line.cumsum(0) - 0.5
        scale = line.sum() / size
        width = scale.clamp(min=1.0)  # of a filter cell: wider than a pixel when shrinking
        centers = (torch.arange(size, device=line.device) + 0.5) * scale
        # Pillow cuts the window at whole pixels.
        reach = width * self.reach
        first = (centers - reach + 0.5).floor().clamp(min=0.0)
        last = (centers + reach + 0.5).floor()
        inside = (places > first[:, None]) & (places < last[:, None])
        weights = self._filter(((places - centers[:, None]) / width).abs()) * inside
        return weights / weights.sum(1, keepdim=True)

    def _filter(self, distance: Tensor) -> Tensor:
        if self.interpolation == "bilinear":
            return (1 - distance).clamp(min=0.0)
        near = (1.5 * distance - 2.5) * distance * distance + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        return torch.where(distance < 1, near, torch.where(distance < 2, far, 0 * far))


def _rounded(values: Tensor) -> Tensor:
    return (values + 0.5).floor().clamp(0.0, 255.0)


@functools.cache
def _pillow_chooses_order() -> bool:
    """Return whether Pillow first resizes the axis that leaves less for the other one."""
    # Newer releases do; older ones always resize the horizontal axis first.
    pattern = np.random.default_rng(0).integers(0, 2, (64, 8), dtype=np.uint8) * 255
    image, bicubic = Image.fromarray(pattern), Image.Resampling.BICUBIC
    down_first = image.resize((8, 8), bicubic).resize((5, 8), bicubic)
    return bool((np.asarray(image.resize((5, 8), bicubic)) == down_first).all())
