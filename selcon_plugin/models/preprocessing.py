"""Preprocessing of the images that a network takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from selcon_plugin.models.pillow_resize import PILLOW_FILTERS, Interpolation

# In units of pixels 0..255, as both hosts normalize.
IMAGENET_PIXEL_MEAN = (123.675, 116.28, 103.53)
IMAGENET_PIXEL_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Preprocessing:
    """Resizing and normalization of an RGB image before the network.

    Attributes:
        size: Height and width to which Pillow resizes the image.
        interpolation: Filter of the resizing: bicubic in FastReID, bilinear in torchreid.
        pixel_mean: Mean of each channel, on the scale 0..255.
        pixel_std: Standard deviation of each channel, on that scale.
    """

    size: tuple[int, int] = (256, 128)
    interpolation: Interpolation = "bilinear"
    pixel_mean: tuple[float, ...] = IMAGENET_PIXEL_MEAN
    pixel_std: tuple[float, ...] = IMAGENET_PIXEL_STD

    @classmethod
    def in_training(
        cls,
        input_size: Sequence[int],
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> Preprocessing:
        """Describe the preprocessing of a host's training loader.

        Args:
            input_size: Height and width of the images. The loader resizes them by a filter
                that the network need not know: the description has the default.
            pixel_mean: Mean of each channel, on the scale 0..255.
            pixel_std: Standard deviation of each channel, on that scale.

        Returns:
            The description.
        """
        height, width = input_size
        return cls(
            (height, width), pixel_mean=tuple(pixel_mean), pixel_std=tuple(pixel_std)
        )

    def resize(self, image: Image.Image) -> NDArray[np.uint8]:
        """Resize an image.

        Args:
            image: 8-bit RGB image of any size.

        Returns:
            Pixels, shape ``(height, width, 3)``.
        """
        height, width = self.size
        resized = image.resize((width, height), PILLOW_FILTERS[self.interpolation])
        return np.array(resized)  # a copy, because Pillow's own pixels are read-only

    def normalize(self, pixels: Tensor) -> Tensor:
        """Convert pixels to the input of the network.

        Args:
            pixels: Values 0..255, shape ``(B, height, width, 3)``.

        Returns:
            Float32, shape ``(B, 3, height, width)``, on the same device.
        """
        mean = torch.tensor(self.pixel_mean, device=pixels.device).view(-1, 1, 1)
        std = torch.tensor(self.pixel_std, device=pixels.device).view(-1, 1, 1)
        return (pixels.permute(0, 3, 1, 2).float() - mean) / std
