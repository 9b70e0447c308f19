"""``tiny_resnet`` of timm: small enough that its checkpoints can lie beside the tests."""

# ruff: noqa: E402
from selcon_plugin.compat import prepare_torchvision

prepare_torchvision()

from timm.models import register_model
from timm.models._builder import build_model_with_cfg
from timm.models.resnet import BasicBlock, ResNet


@register_model
def tiny_resnet(pretrained: bool = False, **options):
    size = {"block": BasicBlock, "layers": [1, 1, 1, 1], "stem_width": 8}
    return build_model_with_cfg(
        ResNet, "tiny_resnet", pretrained, **size, channels=(8, 8, 8, 16), **options
    )
