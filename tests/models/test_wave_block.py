from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selcon_plugin.compat.fastreid import prepare_fastreid
from selcon_plugin.compat.shared import HostMissingError, prepare_torchvision
from selcon_plugin.compat.torchreid import import_torchreid
from selcon_plugin.models.ema import EMATeacher
from selcon_plugin.models.ghost_norm import convert_ghost_batch_norm
from selcon_plugin.models.timm import create_timm_backbone
from selcon_plugin.models.wave_block import (
    CBAM,
    ResidualCBAM,
    WaveBlock,
    insert_wave_blocks,
)

SIZE = (64, 32)


def timm_backbone(name: str, last_stride: int = 1) -> nn.Module:
    prepare_torchvision()
    pytest.importorskip("timm")
    return create_timm_backbone(
        name, input_size=SIZE, pretrained=False, last_stride=last_stride
    )


def torchvision_model(name: str) -> nn.Module:
    prepare_torchvision()
    models = pytest.importorskip("torchvision.models")
    model: nn.Module = getattr(models, name)(weights=None)
    return model


def torchreid_model(name: str) -> nn.Module:
    try:
        torchreid = import_torchreid()
    except HostMissingError as error:
        pytest.skip(str(error))
    model: nn.Module = torchreid.models.build_model(name, 4, pretrained=False)
    return model


def fastreid_backbone(name: str, **options: Any) -> nn.Module:
    try:
        prepare_fastreid()
    except HostMissingError as error:
        pytest.skip(str(error))
    from fastreid.config import get_cfg
    from fastreid.modeling.backbones import BACKBONE_REGISTRY

    cfg = get_cfg()
    cfg.MODEL.BACKBONE.PRETRAIN = False
    for key, value in options.items():
        cfg.MODEL.BACKBONE[key] = value
    model: nn.Module = BACKBONE_REGISTRY.get(name)(cfg)
    return model


# Backbone, the module that follows the second and third stage, and the maps' heights.
FAMILIES: dict[str, tuple[Any, tuple[int, int]]] = {
    "timm resnet18": (lambda: timm_backbone("resnet18"), (8, 4)),
    "timm efficientnet": (lambda: timm_backbone("tf_efficientnet_lite0"), (8, 4)),
    "timm efficientnet, stride 32": (
        lambda: timm_backbone("tf_efficientnet_lite0", 2),
        (8, 4),
    ),
    "timm convnext": (lambda: timm_backbone("convnext_atto", 2), (8, 4)),
    "timm mobilenetv2": (lambda: timm_backbone("mobilenetv2_050"), (8, 4)),
    "timm regnet": (lambda: timm_backbone("regnetx_002"), (8, 4)),
    "torchvision resnet18": (lambda: torchvision_model("resnet18"), (8, 4)),
    "torchvision mobilenetv2": (lambda: torchvision_model("mobilenet_v2"), (8, 4)),
    "torchvision shufflenet": (lambda: torchvision_model("shufflenet_v2_x0_5"), (8, 4)),
    "torchreid resnet18": (lambda: torchreid_model("resnet18"), (8, 4)),
    "torchreid osnet": (lambda: torchreid_model("osnet_x0_25"), (4, 4)),
    "torchreid mobilenetv2": (lambda: torchreid_model("mobilenetv2_x1_0"), (8, 4)),
    "fastreid resnet": (
        lambda: fastreid_backbone("build_resnet_backbone", DEPTH="18x"),
        (8, 4),
    ),
    "fastreid resnet, non-local": (
        lambda: fastreid_backbone("build_resnet_backbone", DEPTH="50x", WITH_NL=True),
        (8, 4),
    ),
    "fastreid osnet": (
        lambda: fastreid_backbone("build_osnet_backbone", DEPTH="x0_25"),
        (4, 4),
    ),
    "fastreid mobilenetv2": (
        lambda: fastreid_backbone("build_mobilenetv2_backbone", DEPTH="1.0x"),
        (8, 4),
    ),
}
family = pytest.mark.parametrize("name", FAMILIES)


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def waves_of(backbone: nn.Module) -> list[WaveBlock]:
    return [m for m in backbone.modules() if isinstance(m, WaveBlock)]


def watch(backbone: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Record the inputs and outputs of each WaveBlock in execution order."""
    seen: list[tuple[Tensor, Tensor]] = []
    for wave in waves_of(backbone):
        wave.register_forward_hook(
            lambda _m, inputs, output: seen.append((inputs[0].detach(), output.detach()))
        )
    return seen


def test_band_is_unchanged_and_other_rows_are_scaled(device: str) -> None:
    """Compute by hand: of 16 rows, five from the sampled position are unchanged."""
    wave = WaveBlock()
    maps = torch.rand(3, 4, 16, 2, device=device) + 1.0
    torch.manual_seed(3)
    start = int(torch.randint(16 - 5 + 1, ()))
    torch.manual_seed(3)
    waved = wave(maps)
    wanted = maps.clone()
    for row in range(16):
        if not start <= row < start + 5:
            wanted[:, :, row] = 1.5 * maps[:, :, row]
    assert torch.equal(waved, wanted)


def test_every_position_is_sampled_equally_often() -> None:
    torch.manual_seed(0)
    wave, ones = WaveBlock(), torch.ones(1, 1, 8, 1)  # a band of 2 rows at 7 positions
    starts = [int((wave(ones).flatten() == 1.0).int().argmax()) for _ in range(1400)]
    counts = torch.bincount(torch.tensor(starts), minlength=8)
    assert counts[7] == 0
    assert counts[:7].min() > 150
    assert counts[:7].max() < 250


def test_wave_keeps_dtype_and_memory_format(device: str) -> None:
    maps = torch.rand(2, 4, 8, 4, device=device).to(memory_format=torch.channels_last)
    assert WaveBlock()(maps).is_contiguous(memory_format=torch.channels_last)
    assert WaveBlock()(maps.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("band_ratio", [-0.1, 1.1])
def test_impossible_band_is_refused(band_ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"band_ratio .* got {band_ratio}"):
        WaveBlock(band_ratio)


def test_cbam_equals_its_definition(device: str) -> None:
    torch.manual_seed(0)
    cbam = CBAM(8, reduction=4, kernel_size=3).to(device)
    maps = torch.rand(2, 8, 5, 4, device=device)
    into, _, out = (
        m.weight.flatten(1) if isinstance(m, nn.Conv2d) else m
        for m in cbam.channel_attention
    )
    kernel = cbam.spatial_attention.weight[0]
    result = cbam(maps)
    for i, one in enumerate(maps):
        squeezed = [one.mean(dim=(1, 2)), one.flatten(1).max(dim=1).values]
        logits = sum(out @ torch.relu(into @ vector) for vector in squeezed)
        weighed = one * torch.sigmoid(logits)[:, None, None]
        places = torch.stack([weighed.mean(dim=0), weighed.max(dim=0).values])
        padded = torch.nn.functional.pad(places, (1, 1, 1, 1))
        for y in range(5):
            for x in range(4):
                weight = torch.sigmoid((kernel * padded[:, y : y + 3, x : x + 3]).sum())
                wanted = weighed[:, y, x] * weight
                assert torch.allclose(result[i, :, y, x], wanted, atol=1e-6)
    residual = ResidualCBAM(8, reduction=4, kernel_size=3).to(device)
    residual.load_state_dict(cbam.state_dict())
    assert torch.allclose(residual(maps), result + maps)


@family
def test_plain_blocks_are_active_in_training_only(name: str) -> None:
    make, heights = FAMILIES[name]
    backbone = make()
    keys = list(backbone.state_dict())
    backbone.eval()
    with torch.no_grad():
        before = backbone(images())
        insert_wave_blocks(backbone, "plain", input_size=SIZE)
        assert torch.equal(backbone(images()), before)
    assert list(backbone.state_dict()) == keys
    seen = watch(backbone)
    with torch.no_grad():
        backbone.train()(images())
    assert tuple(maps.shape[2] for maps, _ in seen) == heights
    for maps, waved in seen:
        inside = [
            row
            for row in range(maps.shape[2])
            if torch.equal(waved[:, :, row], maps[:, :, row])
        ]
        assert len(inside) == round(0.3 * maps.shape[2])
        others = [row for row in range(maps.shape[2]) if row not in inside]
        assert torch.equal(waved[:, :, others], 1.5 * maps[:, :, others])


@family
def test_attentive_blocks_get_gradients_and_keep_the_keys(name: str) -> None:
    backbone = FAMILIES[name][0]()
    keys = set(backbone.state_dict())
    insert_wave_blocks(backbone, "attentive", input_size=SIZE)
    new = set(backbone.state_dict()) - keys
    assert keys <= set(backbone.state_dict())
    assert len(new) == 6
    assert all(key.startswith("wave_blocks.") for key in new)
    output = backbone.train()(images(4))
    output.square().mean().backward()
    for key, parameter in backbone.named_parameters():
        if key in new:
            assert parameter.grad is not None, key
            assert parameter.grad.any(), key
    with torch.no_grad():
        backbone.eval()
        waved = backbone(images())
        for parameter in backbone.wave_blocks.parameters():
            parameter.zero_()  # every attention is 1/2, so x becomes 1.25 x
        assert not torch.allclose(backbone(images()), waved)


def test_blocks_follow_the_stages() -> None:
    """Calling the blocks by hand between the stages of a ResNet gives the same maps."""
    backbone = torchvision_model("resnet18").train()
    plain = copy.deepcopy(backbone)
    insert_wave_blocks(backbone, "plain", input_size=SIZE)
    torch.manual_seed(5)
    with torch.no_grad():
        waved = backbone(images())
    torch.manual_seed(5)
    wave = WaveBlock()
    with torch.no_grad():
        maps = plain.maxpool(plain.relu(plain.bn1(plain.conv1(images()))))
        maps = wave(plain.layer2(plain.layer1(maps)))
        maps = plain.layer4(wave(plain.layer3(maps)))
        wanted = plain.fc(plain.avgpool(maps).flatten(1))
    assert torch.allclose(waved, wanted, atol=1e-6)


def pickled(backbone: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(backbone))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_has_its_own_blocks(duplicate: Any) -> None:
    backbone = timm_backbone("resnet18")
    insert_wave_blocks(backbone, "attentive", input_size=SIZE)
    other = duplicate(backbone).eval()
    with torch.no_grad():
        before = other(images())
        for parameter in backbone.wave_blocks.parameters():
            parameter.zero_()
        assert torch.equal(other(images()), before)
        for parameter in other.wave_blocks.parameters():
            parameter.zero_()
        assert not torch.allclose(other(images()), before)


def test_teacher_has_the_attention_and_no_wave() -> None:
    backbone = timm_backbone("resnet18")
    insert_wave_blocks(backbone, "attentive", input_size=SIZE)
    teacher = EMATeacher(backbone, decay=0.9).train()
    assert teacher.module.state_dict().keys() == backbone.state_dict().keys()
    with torch.no_grad():
        wanted = backbone.eval()(images())
        assert torch.equal(teacher.module(images()), wanted)


def test_weights_are_loaded_before_and_after() -> None:
    trained = timm_backbone("resnet18")
    backbone = timm_backbone("resnet18")
    insert_wave_blocks(backbone, "plain", input_size=SIZE)
    backbone.load_state_dict(trained.state_dict())
    with torch.no_grad():
        assert torch.equal(backbone.eval()(images()), trained.eval()(images()))


def test_a_seed_fixes_the_waves() -> None:
    backbone = timm_backbone("resnet18").train()
    insert_wave_blocks(backbone, "plain", input_size=SIZE)

    def outputs(seed: int) -> Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return torch.stack([backbone(images()) for _ in range(4)])

    assert torch.equal(outputs(1), outputs(1))
    assert not torch.equal(outputs(1), outputs(2))


def test_trial_does_not_change_the_backbone() -> None:
    backbone = timm_backbone("resnet18").train()
    before = copy.deepcopy(backbone.state_dict())
    insert_wave_blocks(backbone, "attentive", input_size=SIZE)
    assert all(module.training for module in backbone.modules())
    for key, tensor in before.items():
        assert torch.equal(backbone.state_dict()[key], tensor), key


def test_runs_under_ghost_norm_and_channels_last() -> None:
    backbone = timm_backbone("resnet18").train()
    insert_wave_blocks(backbone, "attentive", input_size=SIZE)
    convert_ghost_batch_norm(backbone, 2)
    seen = watch(backbone)
    backbone.to(memory_format=torch.channels_last)
    batch = images(4).to(memory_format=torch.channels_last)
    backbone(batch).sum().backward()
    for _, waved in seen:
        assert waved.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_backbones_without_convolutional_stages_are_refused(model: str) -> None:
    prepare_torchvision()
    pytest.importorskip("timm")
    backbone = create_timm_backbone(model, input_size=(224, 224), pretrained=False)
    with pytest.raises(ValueError, match=r"backbone TimmBackbone.*go without WaveBlocks"):
        insert_wave_blocks(backbone, "plain", input_size=(224, 224))
    assert not waves_of(backbone)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="no stages in the backbone Flatten"):
        insert_wave_blocks(nn.Flatten(), "plain")
    backbone = timm_backbone("resnet18")
    with pytest.raises(ValueError, match="kind must be 'plain' or 'attentive', got 'both'"):
        insert_wave_blocks(backbone, "both")  # type: ignore[arg-type]
    insert_wave_blocks(backbone, "plain", input_size=SIZE)
    with pytest.raises(ValueError, match="already has WaveBlocks"):
        insert_wave_blocks(backbone, "attentive", input_size=SIZE)
