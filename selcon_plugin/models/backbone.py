"""Base class of backbones that wrap another library's models: images in, feature map out.

This module knows no host. The subclasses are in :mod:`selcon_plugin.models.timm` and
:mod:`selcon_plugin.models.torchreid`.

Shape shorthand in this module:

    B: images in the batch
    H, W: height and width of the input images
    C: channels of the feature map; h, w: its height and width
"""

from __future__ import annotations

import difflib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from selcon_plugin.models.feature_map import zero_image
from selcon_plugin.models.preprocessing import (
    IMAGENET_PIXEL_MEAN,
    IMAGENET_PIXEL_STD,
    Preprocessing,
)

__all__ = [
    "ModelBackbone",
    "suggest_names",
    "warn_of_fixed_stride",
]

logger = logging.getLogger(__name__)

# The stride of a network whose last stage does not reduce: 256x128 gives 16x8.
REID_STRIDE = 16


class ModelBackbone(nn.Module, ABC):
    """Backbone that wraps a library's model: host-normalized images in, feature map out.

    The images arrive normalized with the host's ``pixel_mean`` and ``pixel_std``. If the
    model expects another normalization, the change between the two is one scale and one
    shift per channel, which is applied here. If the two agree, the images are not touched.

    Layers that the map does not depend on (those after the pooling: the classifier, and in
    some models a projection or a normalization) are removed, because parameters without a
    gradient stop distributed training.

    A subclass implements ``compute_map`` for its library.

    Attributes:
        model: The model, without the layers behind the map.
        feature_dim: Channels C of the map.
        feature_stride: Input pixels per cell of the map, H / h.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        model: nn.Module,
        preprocessing: Preprocessing,
        *,
        model_pixel_mean: Sequence[float] = IMAGENET_PIXEL_MEAN,
        model_pixel_std: Sequence[float] = IMAGENET_PIXEL_STD,
    ) -> None:
        """Wrap ``model`` and run it on one image of zeros.

        Args:
            model: The model. It is changed as described above.
            preprocessing: Size of the images, and how the host normalizes them.
            model_pixel_mean: The mean that the model expects, on the same scale.
            model_pixel_std: The standard deviation that the model expects.
        """
        super().__init__()
        self.model = model
        scale, shift = _normalization_change(
            preprocessing, model_pixel_mean, model_pixel_std
        )
        # They follow from the configuration and are not learned: not in checkpoints.
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self._same_normalization = bool(
            torch.allclose(scale, torch.ones(3))
            and torch.allclose(shift, torch.zeros(3), atol=1e-6)
        )
        feature_map = self._try_out(preprocessing.size)
        self.feature_dim: int = feature_map.shape[1]
        self.feature_stride: int = round(preprocessing.size[0] / feature_map.shape[2])

    def forward(self, images: Tensor) -> Tensor:
        """Compute the feature map.

        Args:
            images: Images as the host normalizes them, shape ``(B, 3, H, W)``.

        Returns:
            The feature map, shape ``(B, C, h, w)``.
        """
        if not self._same_normalization:
            images = images * self.scale[:, None, None] + self.shift[:, None, None]
        return self.compute_map(images)

    @abstractmethod
    def compute_map(self, images: Tensor) -> Tensor:
        """Compute the feature map of images that are normalized for the model.

        Args:
            images: Shape ``(B, 3, H, W)``.

        Returns:
            The feature map, shape ``(B, C, h, w)``.
        """

    def _try_out(self, input_size: Sequence[int]) -> Tensor:
        """Compute the map of a zero image and remove layers it does not depend on."""
        training = self.model.training
        self.eval()
        with torch.enable_grad():
            feature_map: Tensor = self(zero_image(self, input_size))
            parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
            gradients = torch.autograd.grad(
                feature_map.sum(), list(parameters.values()), allow_unused=True
            )
        self.train(training)
        unused = {n for n, g in zip(parameters, gradients, strict=True) if g is None}
        for name, child in self.model.named_children():
            own = {f"{name}.{parameter}" for parameter, _ in child.named_parameters()}
            if own and own <= unused:
                setattr(self.model, name, nn.Identity())
        for name in unused:  # the rest of them share a module with parameters in use
            parameters[name].requires_grad_(False)
        return feature_map.detach()


def warn_of_fixed_stride(backbone: ModelBackbone, label: str) -> None:
    """Log a warning if a backbone built for last stride 1 has a larger stride than 16.

    Args:
        backbone: The backbone.
        label: Name of its model in the message.
    """
    # A stride of 16 measures between 16 and 32 if convolutions lose rows at the edges.
    if backbone.feature_stride > 1.5 * REID_STRIDE:
        logger.warning(
            "%s has no option for its stride: LAST_STRIDE 1 has no effect, and the feature "
            "map stays at stride %d",
            label,
            backbone.feature_stride,
        )


def suggest_names(name: str, names: Iterable[str]) -> str:
    """List the names closest to one that does not exist.

    Args:
        name: The unknown name.
        names: The existing names.

    Returns:
        Up to five names, closest first, joined by commas; ``""`` if none is close.
    """
    return ", ".join(difflib.get_close_matches(name, list(names), n=5, cutoff=0.4))


def _normalization_change(
    host: Preprocessing,
    model_pixel_mean: Sequence[float],
    model_pixel_std: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Return scale and shift, each ``(3,)``, from host to model normalization."""
    host_mean, host_std, own_mean, own_std = (
        torch.tensor(values, dtype=torch.float64)
        for values in (host.pixel_mean, host.pixel_std, model_pixel_mean, model_pixel_std)
    )
    scale = (host_std / own_std).expand(3)
    shift = ((host_mean - own_mean) / own_std).expand(3)
    return scale.float(), shift.float()
