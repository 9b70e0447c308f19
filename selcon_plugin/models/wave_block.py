"""WaveBlock: all rows of a feature map except a random band are scaled up.

Two networks that see differently scaled maps of one image learn different features; a
single network cannot rely on one part of the body. Only training is affected: in evaluation
mode a WaveBlock is the identity. Attention (CBAM) may precede it, so that the network
weights the map before it is scaled.

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
from selcon_plugin.renamed import accept_old_arguments

WaveBlockKind = Literal["plain", "attentive"]

# Attributes of a backbone, and those of them that end the second and the third of four
# stages, at 1/8 and 1/16 of the image's size. The first row that fits is used.
_STAGES_BY_NAME = (
    (("layer1", "layer2", "layer3", "layer4"), ("layer2", "layer3")),  # ResNets
    (("stage2", "stage3", "stage4"), ("stage2", "stage3")),  # RepVGG, ShuffleNetV2
    (("conv2", "conv5", "conv6", "conv9"), ("conv4", "conv6")),  # torchreid's MobileNetV2
    (("conv2", "conv3", "conv4", "conv5"), ("conv3", "conv4")),  # OSNet
)
# In all other MobileNetV2 a stem precedes 1, 2, 3, 4, 3, 3 and 1 blocks.
_MOBILENETV2_STAGES = ("features.6", "features.13")


class WaveBlock(nn.Module):
    """Scaling of all rows of a map except a band at a random height, only in training.

    One position is sampled for the whole batch, as in the authors' release: all images of a
    step are scaled alike, so that the features which the loss compares differ by content
    and not by the scaling. The position comes from torch's global CPU generator, so that a
    seed determines it and no device is waited for.

    Args:
        band_ratio: Fraction of the rows that are not scaled: ``round(band_ratio * h)``.
        factor: Factor on the other rows.

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

    @accept_old_arguments
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
        """Scale a batch of maps.

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
    r"""Convolutional block attention: weights for the channels, then for the positions.

    .. math::
        x' = x \cdot \sigma(W_1 ReLU(W_0 \bar{x}) + W_1 ReLU(W_0 \hat{x})), \qquad
        CBAM(x) = x' \cdot \sigma(f^{7 \times 7}[\bar{x}'; \hat{x}'])

    with the mean and the maximum over the positions (first) and over the channels (second).
    There are no biases and no normalization, as in the paper's equations; the release
    normalizes the second attention.

    Args:
        channels: Channels C.
        reduction: The hidden layer has C / reduction units, at least one.
        kernel_size: Kernel size of the convolution; must be odd.
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
        """Weight a batch of maps.

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
        """Weight a batch of maps, and add the input."""
        return super().forward(feature_map) + feature_map


class _Hook:
    """Forward hook that applies a block to a module's output.

    It is an object and not a closure, so that a deep copy of the backbone gets a copy of
    the block, the same one that it has as its submodule.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Any:
        return self.block(output)


class _Stage(NamedTuple):
    """End of a stage; ``channels`` is their number if the backbone states it."""

    name: str
    end: nn.Module
    channels: int | None = None


def insert_wave_blocks(
    backbone: nn.Module,
    kind: WaveBlockKind,
    *,
    input_size: Sequence[int] = (256, 128),
) -> None:
    """Insert a WaveBlock after the second and the third of a backbone's four stages.

    Known stages are those of FastReID's and torchreid's ResNets, OSNet, MobileNetV2, RepVGG
    and ShuffleNetV2, torchvision's ResNets and MobileNetV2, and every timm model that
    states where it halves the resolution (``feature_info``), as it is or wrapped as a
    :class:`~selcon_plugin.models.timm.TimmBackbone`.

    The blocks become the submodule ``wave_blocks`` and run as forward hooks, so that the
    keys of the backbone's own weights do not change, weights can be loaded before and
    after, and a deep copy has its own blocks. Call this before the optimizer, the
    ``DistributedDataParallel`` wrapper and the EMA teacher are created. The backbone runs
    once on an image of zeros; its state does not change.

    Args:
        backbone: The backbone, changed in place.
        kind: ``"plain"``, or ``"attentive"`` for a residual CBAM before each WaveBlock,
            with its own new weights.
        input_size: Height and width of the images.

    Raises:
        ValueError: If ``kind`` is unknown, the backbone already has WaveBlocks or has no
            stages, or a stage returns no feature map ``(B, C, h, w)``.
    """
    name = type(backbone).__name__
    if kind not in get_args(WaveBlockKind):
        raise ValueError(f"kind must be 'plain' or 'attentive', got {kind!r}")
    if hasattr(backbone, "wave_blocks"):
        raise ValueError(f"the backbone {name} already has WaveBlocks: insert them once")
    stages = _middle_stages(backbone)
    if not stages:
        raise ValueError(
            f"found no stages in the backbone {name}, and WaveBlocks follow the second and "
            "third of four: choose a backbone with stages (a ResNet, OSNet, MobileNetV2, "
            "or a timm model with feature_info), or go without WaveBlocks"
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
    """Find the second and the third of four stages; empty if there are no stages."""
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
    # There is an entry for each resolution, in many models the stem's first. A plain Vision
    # Transformer lists its blocks, which all have one resolution.
    if len(info) < 4 or info[-3]["reduction"] >= info[-2]["reduction"]:
        return []
    return [
        _Stage(stage["module"], _end_of(model, stage["module"]), stage["num_chs"])
        for stage in info[-3:-1]
    ]


def _end_of(model: nn.Module, name: str) -> nn.Module:
    """Find the module whose output is a stage's output, however the model runs it."""
    # FastReID's ResNets may have non-local blocks, one of them after a stage's last block.
    non_local = list(getattr(model, f"NL_{name.removeprefix('layer')}", ()))
    if non_local:
        return cast(nn.Module, non_local[-1])
    end = model.get_submodule(name)
    # FastReID's ResNets and timm's checkpointing call the blocks without the Sequential.
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
                f"return one feature map (B, C, h, w), got {shapes}: choose a "
                "convolutional backbone, or go without WaveBlocks"
            )
        channels.append(seen[0].shape[1])
    return channels
