"""Conversion of a backbone's output to a feature map ``(B, C, h, w)``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_MAX_PREFIX_TOKENS = 16


# Height over width of a token grid may differ from the image's by this factor (rounding).
_ASPECT_TOLERANCE = 1.25


def as_feature_map(
    output: Tensor,
    input_size: Sequence[int],
    stride: int | None = None,
    *,
    num_prefix_tokens: int | None = None,
) -> Tensor:
    """Convert the output of a backbone to a feature map.

    * ``(B, C, h, w)`` is a feature map and is returned as it is. All of FastReID's own
      backbones return this. Its Vision Transformer returns only the class token, in the
      form ``(B, 768, 1, 1)``: a map of one row, which cannot be split into horizontal
      parts.
    * ``(B, N, C)`` are tokens in reading order. The prefix tokens at the front are dropped,
      and the patches are arranged on the grid.
    * ``(B, C)`` are vectors, which become a map of size 1x1.

    Args:
        output: Output of the backbone.
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
    """Find the size of a backbone's feature map by running it on one image of zeros.

    The backbone runs in evaluation mode without gradients. The mode of every submodule, and
    with it the batch-norm statistics, stay as they were.

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
            output = backbone(zero_image(backbone, input_size))
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


def format_size(input_size: Sequence[int]) -> str:
    """Return an image size as height x width, for instance ``256x128``."""
    return f"{input_size[0]}x{input_size[1]}"


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
        f"{num_tokens} tokens do not fit a grid over images of {format_size(input_size)}"
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


def zero_image(module: nn.Module, input_size: Sequence[int]) -> Tensor:
    """Return a black image ``(1, 3, H, W)`` on the device and in the type of a module."""
    parameter = next(module.parameters(), torch.empty(0))
    return parameter.new_zeros(1, 3, input_size[0], input_size[1])
