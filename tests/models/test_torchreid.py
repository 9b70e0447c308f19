import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.network import message_of, nothing_left_open, refusing_server
from selcon_plugin.compat.shared import HostMissingError
from selcon_plugin.compat.torchreid import import_torchreid
from selcon_plugin.models.preprocessing import Preprocessing
from selcon_plugin.models.torchreid import (
    TorchreidBackbone,
    add_to_model_factory,
    create_torchreid_backbone,
    torchreid_model_names,
)

SIZE = (128, 64)
# (name, channels, map of a 128x64 image at last_stride 1)
MODELS = [
    ("osnet_x0_25", 128, (8, 4)),
    ("osnet_ibn_x1_0", 512, (8, 4)),
    ("osnet_ain_x1_0", 512, (8, 4)),
    ("resnet50", 2048, (8, 4)),
    ("resnet50_ibn_a", 2048, (8, 4)),
    ("mobilenetv2_x1_0", 1280, (4, 2)),
    ("shufflenet", 960, (4, 2)),
    ("pcb_p6", 2048, (8, 4)),
]

# torchreid's HACNN
ignore_upsample = pytest.mark.filterwarnings("ignore:.*upsample. is deprecated:UserWarning")
ignore_grid = pytest.mark.filterwarnings("ignore:Default grid_sample:UserWarning")


@pytest.fixture(scope="module")
def models() -> ModuleType:
    return import_torchreid().models


@pytest.fixture
def factory(models: ModuleType) -> Iterator[dict[str, Callable[..., nn.Module]]]:
    """Yield torchreid's dictionary of models, and restore it afterwards."""
    names = vars(models)["__model_factory"]
    before = dict(names)
    yield names
    names.clear()
    names.update(before)


def random_images(batch: int, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def build(models: ModuleType, name: str, num_classes: int = 5) -> nn.Module:
    """Build the original torchreid model with changed batch-norm statistics."""
    torch.manual_seed(0)
    model = models.build_model(name, num_classes, pretrained=False, use_gpu=False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return model.eval()


def save_as_in_zoo(model: nn.Module, path: Path) -> str:
    """Write a checkpoint as torchreid's ``save_checkpoint`` does, from a DataParallel."""
    states = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": states, "epoch": 60, "rank1": 0.5}, path)
    return str(path)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    unit = expected.abs().max()
    assert unit > 1e-6
    torch.testing.assert_close(actual / unit, expected / unit, rtol=0, atol=1e-5)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# --- the models of the list --------------------------------------------------------------


@pytest.mark.parametrize(("name", "channels", "grid"), MODELS)
def test_map_reproduces_the_output_of_the_original_model(
    name: str, channels: int, grid: tuple[int, int], models: ModuleType, tmp_path: Path
) -> None:
    """A checkpoint with torchreid's own names also sets every kept layer."""
    model = build(models, name)
    backbone = create_torchreid_backbone(
        name,
        input_size=SIZE,
        pretrained=True,
        weights=save_as_in_zoo(model, tmp_path / "zoo.pth"),
        last_stride=2,  # as torchreid defines the model
    )
    states = model.state_dict()
    for key, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, states[key.removeprefix("model.")])
    images = random_images(2)
    with torch.no_grad():
        feature_map = backbone.eval()(images)
        expected = model(images)
        if name == "pcb_p6":
            actual = F.normalize(model.parts_avgpool(feature_map), dim=1).flatten(1)
        else:
            actual = feature_map.mean(dim=(2, 3))
            if getattr(model, "fc", None) is not None:
                actual = model.fc(actual)
    assert_close(actual, expected)


@pytest.mark.parametrize(("name", "channels", "grid"), MODELS)
def test_model_returns_a_map_and_all_its_weights_get_gradients(
    name: str, channels: int, grid: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    backbone = create_torchreid_backbone(name, input_size=SIZE)
    assert backbone.training
    assert backbone.has_feature_map
    assert backbone.feature_dim == channels
    assert backbone.feature_stride == SIZE[0] // grid[0]
    assert 256 // backbone.feature_stride >= 4

    feature_map = backbone(random_images(4))
    assert feature_map.shape == (4, channels, *grid)
    (feature_map * torch.randn_like(feature_map)).sum().backward()
    # Distributed training needs every gradient; it may be zero, as OSNet's gates can close.
    assert [n for n, p in backbone.named_parameters() if p.grad is None] == []
    assert next(backbone.parameters()).grad.any()


# --- the other models --------------------------------------------------------------------


def pooled(model: nn.Module, vector: Tensor, feature_map: Tensor) -> tuple[Tensor, Tensor]:
    return feature_map.mean(dim=(2, 3)), vector


def pooled_last(
    model: nn.Module, vector: Tensor, feature_map: Tensor
) -> tuple[Tensor, Tensor]:
    return feature_map.mean(dim=(2, 3)), vector[:, -feature_map.shape[1] :]


def global_half(model: Any, vector: Tensor, feature_map: Tensor) -> tuple[Tensor, Tensor]:
    embedded = model.fc_global(feature_map.mean(dim=(2, 3)))
    return F.normalize(embedded, dim=1), vector[:, :512]


# Models without `featuremaps` in torchreid, or with several maps: image size, and how to
# compare the map with the model's own vector.
UNLIKE_THE_OTHERS = [
    ("densenet121", SIZE, pooled),
    ("squeezenet1_1", SIZE, pooled),
    ("inceptionv4", (160, 96), pooled),
    ("nasnsetmobile", SIZE, pooled),
    ("resnet50mid", SIZE, pooled_last),
    ("hacnn", (160, 64), global_half),
]


@ignore_upsample
@ignore_grid
@pytest.mark.parametrize(("name", "size", "comparable"), UNLIKE_THE_OTHERS)
def test_map_of_other_models(
    name: str, size: tuple[int, int], comparable: Callable[..., Any], models: ModuleType
) -> None:
    model = build(models, name)
    images = random_images(1, size)
    with torch.no_grad():
        vector = model(images)
        backbone = TorchreidBackbone(model, Preprocessing(size))
        assert backbone.has_feature_map
        feature_map = backbone(images)
    with torch.no_grad():
        assert_close(*comparable(build(models, name), vector, feature_map))


def test_map_of_mlfn(models: ModuleType) -> None:
    """Compare the input of the pooling, since the vector also has factors of all blocks."""
    model = build(models, "mlfn")
    seen = []
    hook = model.global_avgpool.register_forward_pre_hook(
        lambda _, args: seen.append(*args)
    )
    images = random_images(1)
    with torch.no_grad():
        model(images)
        hook.remove()
        assert_close(TorchreidBackbone(model, Preprocessing(SIZE))(images), seen[0])


@pytest.mark.slow
@ignore_upsample
def test_every_model_of_torchreid_has_a_map(models: ModuleType) -> None:
    names = torchreid_model_names()
    assert len(names) >= 49
    for name in names:
        with torch.device("meta"):  # shapes and graph without arithmetic
            model = models.build_model(name, 1, pretrained=False, use_gpu=False)
        backbone = TorchreidBackbone(model, Preprocessing())
        assert backbone.has_feature_map, name
        assert 256 // backbone.feature_stride >= 5, name
        frozen = [n for n, p in backbone.named_parameters() if not p.requires_grad]
        assert all("hard_attn" in n for n in frozen), (
            name
        )  # regions of HACNN's local branch


class WithoutMap(nn.Module):
    """A model with torchreid's interface whose feature map is not accessible."""

    def __init__(
        self, num_classes: int, loss: str, pretrained: bool, use_gpu: bool
    ) -> None:
        super().__init__()
        self.loss = loss
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.classifier = nn.Linear(6, num_classes)

    def forward(self, images: Tensor) -> Any:
        vector = self.layers(images)
        if not self.training:
            return vector
        logits = self.classifier(vector)
        return (logits, vector) if self.loss == "triplet" else logits


def test_model_without_an_accessible_map_is_refused(
    factory: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    factory["my_model"] = WithoutMap
    assert "my_model" in torchreid_model_names()
    backbone = create_torchreid_backbone("my_model", input_size=SIZE, last_stride=2)
    assert not backbone.has_feature_map
    assert backbone.feature_dim == 6
    (warning,) = warnings_in(caplog)
    assert "map of WithoutMap cannot be reached: there are only global features" in warning

    images = random_images(2)
    expected = backbone.model.layers(images)[:, :, None, None]
    assert torch.equal(backbone(images), expected)
    assert torch.equal(backbone.eval()(images), expected)
    backbone.train()(images).sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


# --- stride, normalization, names --------------------------------------------------------


SE_RESNET = {
    "groups": 1,
    "reduction": 16,
    "inplanes": 64,
    "input_3x3": False,
    "downsample_kernel_size": 1,
    "downsample_padding": 0,
}


@pytest.mark.parametrize(
    ("name", "block", "layers", "options"),
    [
        ("resnet18", "BasicBlock", [2, 2, 2, 2], {}),
        ("resnet50mid", "Bottleneck", [3, 4, 6, 3], {"fc_dims": [8]}),
        ("se_resnet50", "SEResNetBottleneck", [3, 4, 6, 3], SE_RESNET),
    ],
)
def test_last_stride_equals_that_of_the_constructor(
    name: str, block: str, layers: list[int], options: dict[str, Any]
) -> None:
    backbone = create_torchreid_backbone(name, input_size=SIZE).eval()
    assert backbone.feature_stride == 16
    cls = type(backbone.model)
    model = cls(
        num_classes=1,
        loss="softmax",
        block=vars(sys.modules[cls.__module__])[block],
        layers=layers,
        last_stride=1,
        **options,
    ).eval()
    model.load_state_dict(backbone.model.state_dict(), strict=False)
    images = random_images(1)
    with torch.no_grad():
        maps = model.featuremaps(images)
        expected = maps[-1] if isinstance(maps, tuple) else maps
        assert torch.equal(backbone(images), expected)


@pytest.mark.parametrize(
    ("name", "last_stride", "warned"),
    [
        ("mobilenetv2_x1_0", 1, True),
        ("mobilenetv2_x1_0", 2, False),
        ("squeezenet1_1", 1, False),  # stride 16, one row less at the edge
    ],
)
def test_last_stride_without_effect_is_logged_once(
    name: str, last_stride: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    create_torchreid_backbone(name, input_size=SIZE, last_stride=last_stride)
    assert len(warnings_in(caplog)) == warned
    assert (f"torchreid's {name} has no option for its stride" in caplog.text) == warned


def test_host_normalization_is_replaced_by_that_of_torchreid(models: ModuleType) -> None:
    model = build(models, "squeezenet1_1")
    mean, std = (120.0, 110.0, 100.0), (60.0, 50.0, 40.0)
    backbone = TorchreidBackbone(model, Preprocessing(SIZE, pixel_mean=mean, pixel_std=std))
    pixels = torch.randint(0, 256, (2, 3, *SIZE)).float()
    normalize = importlib.import_module("torchvision.transforms").Normalize
    own = normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])(pixels / 255)
    with torch.no_grad():
        assert_close(backbone(normalize(mean, std)(pixels)), model.features(own))
        usual = TorchreidBackbone(model, Preprocessing(SIZE))
        assert torch.equal(usual(own), model.features(own))


def test_added_names_build_through_torchreid(
    models: ModuleType, factory: dict[str, Any]
) -> None:
    before, count = torchreid_model_names(), len(factory)
    calls = []

    def constructor(**keywords: Any) -> nn.Module:
        calls.append(keywords)
        return nn.Identity()

    add_to_model_factory("selcon_thing", constructor)
    add_to_model_factory("selcon_thing", lambda **_: pytest.fail("a second call changes"))
    assert isinstance(models.build_model("selcon_thing", 7, use_gpu=False), nn.Identity)
    assert calls == [
        {"num_classes": 7, "loss": "softmax", "pretrained": True, "use_gpu": False}
    ]
    assert torchreid_model_names() == before
    assert len(factory) == count + 1
    with pytest.raises(ValueError, match="name must start with 'selcon_', got 'thing'"):
        add_to_model_factory("thing", constructor)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"no model named 'osnet_x1'; closest: osnet_x1_0"):
        create_torchreid_backbone("osnet_x1")
    with pytest.raises(ValueError, match=r"no model named ''; it has resnet18, resnet34"):
        create_torchreid_backbone("")


def test_images_that_are_too_small() -> None:
    with pytest.raises(ValueError, match=r"inceptionv4 gives no feature map .* 64x32: "):
        create_torchreid_backbone("inceptionv4", input_size=(64, 32))


def test_torchreid_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HostMissingError, match="pip install --no-deps torchreid"):
        create_torchreid_backbone("osnet_x0_25")


# --- weights -----------------------------------------------------------------------------


def test_unused_tensors_of_a_file_are_reported(
    models: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_as_in_zoo(build(models, "osnet_x0_25"), tmp_path / "zoo.pth")
    create_torchreid_backbone("osnet_x0_25", input_size=SIZE, pretrained=True, weights=path)
    (warning,) = warnings_in(caplog)
    assert "zoo.pth: 9 tensors not in the model, ignored: fc.0.weight, " in warning


def test_own_checkpoint_loads_again(tmp_path: Path) -> None:
    first = create_torchreid_backbone("osnet_x0_25", input_size=SIZE)
    content = {f"backbone.{name}": tensor for name, tensor in first.state_dict().items()}
    torch.save(content, tmp_path / "own.pth")
    second = create_torchreid_backbone(
        "osnet_x0_25", input_size=SIZE, pretrained=True, weights=str(tmp_path / "own.pth")
    )
    for name, tensor in second.state_dict().items():
        assert torch.equal(tensor, content[f"backbone.{name}"])


def test_file_of_another_model(models: ModuleType, tmp_path: Path) -> None:
    path = save_as_in_zoo(build(models, "squeezenet1_1"), tmp_path / "squeeze.pth")
    with pytest.raises(
        ValueError, match=r"squeeze\.pth do not fit OSNet: only 0 of its 558"
    ):
        create_torchreid_backbone(
            "osnet_x0_25", input_size=SIZE, pretrained=True, weights=path
        )


def test_download_uses_torchreid(
    models: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build(models, "squeezenet1_1")
    zoo = sys.modules[type(source).__module__].model_zoo
    monkeypatch.setattr(zoo, "load_url", lambda *args, **_: source.state_dict())
    backbone = create_torchreid_backbone("squeezenet1_1", input_size=SIZE, pretrained=True)
    states = source.state_dict()
    for name, tensor in backbone.model.state_dict().items():
        assert torch.equal(tensor, states[name])


def test_error_of_a_failed_download_includes_remedies(
    models: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(importlib.import_module("gdown"), "download", fail)
    with pytest.raises(RuntimeError, match=r"osnet_x0_25: no network.*PRETRAIN_PATH"):
        create_torchreid_backbone("osnet_x0_25", input_size=SIZE, pretrained=True)


def test_refused_download_leaves_no_connection(
    models: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = sys.modules[type(build(models, "resnet18")).__module__]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def create() -> None:
        create_torchreid_backbone("resnet18", input_size=SIZE, pretrained=True)

    with refusing_server() as url, nothing_left_open():
        monkeypatch.setitem(source.model_urls, "resnet18", f"{url}/resnet18.pth")
        assert "403" in message_of(RuntimeError, create)


def test_model_without_weights_to_download() -> None:
    """Without the error, torchreid would silently continue with random weights."""
    with pytest.raises(RuntimeError, match=r"no pre-trained weights of hacnn to download"):
        create_torchreid_backbone("hacnn", input_size=SIZE, pretrained=True)
