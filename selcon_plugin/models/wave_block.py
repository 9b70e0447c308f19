"""WaveBlock: a feature map whose rows are scaled up at random, but for one band of them.

Two networks that see differently waved maps of one image learn different features; a
single network cannot rely on one part of the body. Only training changes: in evaluation
a WaveBlock is the identity. Attention (CBAM) may go before it, so that the network weighs
the map before it is waved.

Wang et al., "Attentive WaveBlock: Complementarity-enhanced Mutual Networks for Unsupervised
Domain Adaptation in Person Re-identification and Beyond", 2022.
https://arxiv.org/abs/2006.06525

Woo et al., "CBAM: Convolutional Block Attention Module", ECCV 2018.
https://arxiv.org/abs/1807.06521

Shape shorthand in this module:

    B: images in the batch
    C: channels of the feature map; h, w: its height and width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from selcon_plugin.models.feature_map import infer_feature_shape

WaveBlockKind = Literal["plain", "attentive"]

# What a backbone has, and which of it ends the second and the third of four stages: those
# that work at 1/8 and 1/16 of the image's size. The first row that fits counts.
_STAGES_BY_NAME = (
    (("layer1", "layer2", "layer3", "layer4"), ("layer2", "layer3")),  # ResNets
    (("stage2", "stage3", "stage4"), ("stage2", "stage3")),  # RepVGG, ShuffleNetV2
    (("conv2", "conv5", "conv6", "conv9"), ("conv4", "conv6")),  # torchreid's MobileNetV2
    (("conv2", "conv3", "conv4", "conv5"), ("conv3", "conv4")),  # OSNet
)
# All other MobileNetV2: the stem, then 1, 2, 3, 4, 3, 3 and 1 blocks.
_MOBILENETV2_STAGES = ("features.6", "features.13")


class WaveBlock(nn.Module):
    """Scale all rows of a map but a band at a random height; in evaluation do nothing.

    One place is drawn for the whole batch, as in the authors' release: all images of a step
    are waved alike, and what the loss compares differs by its content, not by the wave. It
    comes from torch's global CPU generator, so that a seed fixes it and no device is waited
    for.

    Args:
        band_ratio: Share of the rows that stay as they are: ``round(band_ratio * h)``.
        factor: What the other rows are multiplied by.

    Raises:
        ValueError: If ``band_ratio`` is outside [0, 1].

    Example:
        >>> wave = WaveBlock()
        >>> waved = wave(torch.ones(1, 1, 10, 1)).flatten()
        >>> (waved == 1.0).sum().item(), (waved == 1.5).sum().item()
        (3, 7)
        >>> wave.eval()(torch.ones(1, 1, 10, 1)).unique().tolist()
        [1.0]
    """

    def __init__(self, band_ratio: float = 0.3, factor: float = 1.5) -> None:
        super().__init__()
        if not 0 <= band_ratio <= 1:
            raise ValueError(f"band_ratio must lie in [0, 1], got {band_ratio}")
        self.band_ratio = band_ratio
        self.factor = factor

    def extra_repr(self) -> str:
        """Describe the settings in ``print(model)``."""
        return f"band_ratio={self.band_ratio}, factor={self.factor}"

    def forward(self, feature_map: Tensor) -> Tensor:
        """Wave a batch of maps.

        Args:
            feature_map: Shape ``(B, C, h, w)``.

        Returns:
            The same shape, type and memory format.
        """
        if not self.training:
            return feature_map
        height = feature_map.shape[2]
        band = round(self.band_ratio * height)
        start = int(torch.randint(height - band + 1, (), device="cpu"))
        scale = feature_map.new_full((height, 1), self.factor)
        scale[start : start + band] = 1.0
        return feature_map * scale


class CBAM(nn.Module):
    r"""Convolutional block attention: weigh the channels, then the places.

    .. math::
        x' = x \cdot \sigma(W_1 ReLU(W_0 \bar{x}) + W_1 ReLU(W_0 \hat{x})), \qquad
        CBAM(x) = x' \cdot \sigma(f^{7 \times 7}[\bar{x}'; \hat{x}'])

    with the mean and the maximum over the places (first) and over the channels (second).
    There are no biases and no normalization, as in the paper's equations; the release
    normalizes the second attention.

    Args:
        channels: Channels C.
        reduction: The hidden layer has C / reduction units, at least one.
        kernel_size: Of the convolution, odd.
    """

    def __init__(self, channels: int, reduction: int = 16, kernel_size: int = 7) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.channel_attention = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1, bias=False),
        )
        self.spatial_attention = nn.Conv2d(
            2, 1, kernel_size, padding=kernel_size // 2, bias=False
        )

    def forward(self, feature_map: Tensor) -> Tensor:
        """Weigh a batch of maps.

        Args:
            feature_map: Shape ``(B, C, h, w)``.

        Returns:
            The same shape.
        """
        mean = feature_map.mean(dim=(2, 3), keepdim=True)
        highest = feature_map.amax(dim=(2, 3), keepdim=True)
        by_channel = self.channel_attention(mean) + self.channel_attention(highest)
        weighed = feature_map * by_channel.sigmoid()
        places = torch.cat(
            [weighed.mean(dim=1, keepdim=True), weighed.amax(dim=1, keepdim=True)], dim=1
        )
        result: Tensor = weighed * self.spatial_attention(places).sigmoid()
        return result


class ResidualCBAM(CBAM):
    """``CBAM(x) + x``; arguments and shapes as in :class:`CBAM`."""

    def forward(self, feature_map: Tensor) -> Tensor:
        """Weigh a batch of maps and add them."""
        return super().forward(feature_map) + feature_map


class _Hook:
    """Puts a block behind a module.

    An object, not a closure: a deep copy of the backbone gets a copy of the block, the one
    that it has as its submodule.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Any:
        return self.block(output)


class _Stage(NamedTuple):
    """The end of a stage; ``channels`` where the backbone says how many there are."""

    name: str
    end: nn.Module
    channels: int | None = None


def insert_wave_blocks(
    backbone: nn.Module,
    kind: WaveBlockKind,
    *,
    input_size: Sequence[int] = (256, 128),
) -> None:
    """Put a WaveBlock behind the second and the third of a backbone's four stages.

    Stages are those of FastReID's and torchreid's ResNets, OSNet, MobileNetV2, RepVGG and
    ShuffleNetV2, torchvision's ResNets and MobileNetV2, and every model of timm that says
    where it halves the resolution (``feature_info``), bare or as a
    :class:`~selcon_plugin.models.timm.TimmBackbone`.

    The blocks become the submodule ``wave_blocks`` and run as forward hooks, so that the
    keys of the backbone's own weights stay, weights can be loaded before and after, and a
    deep copy has blocks of its own. Call this before the optimizer, the
    ``DistributedDataParallel`` wrapper and the EMA teacher are made. The backbone is tried
    once on an image of zeros; its state stays.

    Args:
        backbone: Changed in place.
        kind: ``"plain"``, or ``"attentive"`` for a residual CBAM before each WaveBlock,
            with new weights of its own.
        input_size: Height and width of the images.

    Raises:
        ValueError: If ``kind`` is unknown, the backbone has WaveBlocks already or has no
            stages, or a stage gives no feature map ``(B, C, h, w)``.
    """
    name = type(backbone).__name__
    if kind not in get_args(WaveBlockKind):
        raise ValueError(f"kind must be 'plain' or 'attentive', got {kind!r}")
    if hasattr(backbone, "wave_blocks"):
        raise ValueError(f"the backbone {name} has WaveBlocks already: insert them once")
    stages = _middle_stages(backbone)
    if not stages:
        raise ValueError(
            f"found no stages in the backbone {name}, and WaveBlocks stand behind the "
            "second and third of four: choose a backbone with stages (a ResNet, OSNet, "
            "MobileNetV2, or a timm model with feature_info), or go without WaveBlocks"
        )
    channels = _channels_behind(backbone, stages, input_size)
    like = next(backbone.parameters())
    blocks = [_make_block(kind, count).to(like.device, like.dtype) for count in channels]
    backbone.wave_blocks = nn.ModuleList(blocks)
    backbone.wave_blocks.train(backbone.training)
    for stage, block in zip(stages, blocks, strict=True):
        stage.end.register_forward_hook(_Hook(block))


def _make_block(kind: WaveBlockKind, channels: int) -> nn.Module:
    if kind == "plain":
        return WaveBlock()
    return nn.Sequential(ResidualCBAM(channels), WaveBlock())


def _middle_stages(backbone: nn.Module) -> list[_Stage]:
    """Find the second and third of four stages; none where there are no such."""
    model: nn.Module = getattr(backbone, "model", backbone)  # in a TimmBackbone
    info = getattr(model, "feature_info", None)
    if isinstance(info, list):
        return _timm_stages(model, info)
    for required, names in _STAGES_BY_NAME:
        if all(hasattr(backbone, name) for name in required):
            return [_Stage(name, _end_of(backbone, name)) for name in names]
    if type(backbone).__name__ == "MobileNetV2" and hasattr(backbone, "features"):
        return [_Stage(name, backbone.get_submodule(name)) for name in _MOBILENETV2_STAGES]
    return []


def _timm_stages(model: nn.Module, info: list[dict[str, Any]]) -> list[_Stage]:
    # An entry for each resolution, the stem's first in many models. A plain Vision
    # Transformer lists its blocks, all of one resolution.
    if len(info) < 4 or info[-3]["reduction"] >= info[-2]["reduction"]:
        return []
    return [
        _Stage(stage["module"], _end_of(model, stage["module"]), stage["num_chs"])
        for stage in info[-3:-1]
    ]


def _end_of(model: nn.Module, name: str) -> nn.Module:
    """Find the module whose output is that of a stage, however the model runs it."""
    # FastReID's ResNets may have non-local blocks; one follows the last of a stage.
    non_local = list(getattr(model, f"NL_{name.removeprefix('layer')}", ()))
    if non_local:
        return cast(nn.Module, non_local[-1])
    end = model.get_submodule(name)
    # FastReID's ResNets and timm's checkpointing run the blocks without the Sequential.
    while type(end) is nn.Sequential:
        end = list(end)[-1]
    return end


def _channels_behind(
    backbone: nn.Module, stages: list[_Stage], input_size: Sequence[int]
) -> list[int]:
    """Run the backbone once and return the channels of the stages' maps."""
    outputs: list[list[Any]] = [[] for _ in stages]

    def remember(seen: list[Any]) -> Callable[..., None]:
        return lambda module, inputs, output: seen.append(output)

    handles = [
        stage.end.register_forward_hook(remember(seen))
        for stage, seen in zip(stages, outputs, strict=True)
    ]
    try:
        infer_feature_shape(backbone, input_size)
    finally:
        for handle in handles:
            handle.remove()
    channels = []
    for stage, seen in zip(stages, outputs, strict=True):
        shapes = [tuple(o.shape) if isinstance(o, Tensor) else type(o) for o in seen]
        one_map = len(seen) == 1 and isinstance(seen[0], Tensor) and seen[0].dim() == 4
        if not one_map or stage.channels not in (None, seen[0].shape[1]):
            raise ValueError(
                f"the stage {stage.name} of the backbone {type(backbone).__name__} must "
                f"give one feature map (B, C, h, w), got {shapes}: choose a convolutional "
                "backbone, or go without WaveBlocks"
            )
        channels.append(seen[0].shape[1])
    return channels
