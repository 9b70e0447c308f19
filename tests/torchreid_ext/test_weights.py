"""Weights load whole into the architecture of their training, by torchreid's doors too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from selcon_plugin.compat import import_torchreid
from selcon_plugin.models.architecture import ArchitectureMismatchError
from selcon_plugin.models.pretrained import read_network_file
from selcon_plugin.torchreid_ext import build_selcon_model
from selcon_plugin.torchreid_ext.models import adopt_model, fit_to_method
from selcon_plugin.torchreid_ext.weights import load_network

torchreid = import_torchreid()
utils = torchreid.utils
SIZE = (64, 32)
NAME = "osnet_x0_25"


def build(name: str = NAME, *, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    options = {"num_parts": 2, "input_size": SIZE, **options}
    return build_selcon_model(name, pretrained=False, **options).eval()


def factory(name: str = NAME) -> Any:
    """Build a model as torchreid's scripts and its FeatureExtractor do."""
    torch.manual_seed(9)
    return torchreid.models.build_model(
        f"selcon_{name}", num_classes=0, pretrained=False, use_gpu=False
    ).eval()


def images() -> torch.Tensor:
    return torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def save(model: Any, file: Path, *, record: bool = True) -> str:
    """Write a checkpoint as the engine does, or as earlier versions did."""
    state = model.state_dict()
    entry = {"architecture": model.architecture()} if record else {}
    checkpoint = {"state_dict": state if record else dict(state), "epoch": 3, **entry}
    torch.save(checkpoint | {"optimizer": {}}, file)
    return str(file)


def by_pretrained(model: Any, file: str) -> None:
    utils.load_pretrained_weights(model, file)


def by_resuming(model: Any, file: str) -> None:
    assert utils.resume_from_checkpoint(file, model) == 3


def by_checkpoint(model: Any, file: str) -> None:
    model.load_state_dict(utils.load_checkpoint(file)["state_dict"])


def by_torch(model: Any, file: str) -> None:
    model.load_state_dict(torch.load(file, weights_only=True)["state_dict"], strict=False)


def by_plugin(model: Any, file: str) -> None:
    load_network(model, file)


DOORS = [by_pretrained, by_resuming, by_checkpoint, by_torch, by_plugin]


@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize("door", DOORS)
def test_network_without_parts_has_none_behind_any_door(
    door: Any, record: bool, tmp_path: Path
) -> None:
    """ClusterContrast trains no parts; torchreid's factory builds eight."""
    trained = build(num_parts=0)
    model = factory()
    assert model.heads.num_parts == 8
    door(model, save(trained, tmp_path / "a.pth", record=record))
    assert torch.equal(model(images()), trained(images()))


@pytest.mark.parametrize("door", DOORS)
def test_stride_of_an_adopted_model_is_refused_in_another(
    door: Any, tmp_path: Path
) -> None:
    """torchreid's resnet18 has stride 2 in its last stage, selcon_resnet18 has 1."""
    plain = torchreid.models.build_model("resnet18", num_classes=1, pretrained=False)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    adopted = adopt_model(plain, optimizer, None, input_size=SIZE, num_parts=0)
    file = save(adopted, tmp_path / "a.pth")
    model = factory("resnet18")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pattern = r"layer4\.\S+ has stride 2x2 in the weights, stride 1x1 .*last_stride"
    with pytest.raises(ArchitectureMismatchError, match=pattern):
        door(model, file)
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if k in after)
    door(build("resnet18", num_parts=0, last_stride=2), file)


MISMATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "parts": ({"num_parts": 4}, "parts: 2 in the weights, 4 in"),
    "backbone": ({"name": "osnet_ain_x0_25"}, f"{NAME} in .*, osnet_ain_x0_25 in"),
    "pooling": ({"pool": "max"}, "pooling: average in .*, maximum in"),
    "width": ({"embedding_dim": 64}, "128 in the weights, 64 in the network"),
    "size": ({"input_size": (96, 32)}, "input size: 64x32 in .*, 96x32 in .*data.height"),
    "mean": ({"pixel_mean": (127.5,) * 3}, "123.675x.* 127.5x127.5x127.5 .*norm_mean"),
    "std": ({"pixel_std": (127.5,) * 3}, "58.395x.* 127.5x127.5x127.5 .*norm_std"),
}


@pytest.mark.parametrize("door", [by_pretrained, by_checkpoint, by_plugin])
@pytest.mark.parametrize("case", MISMATCHES)
def test_other_architecture_is_refused_with_both_values(
    case: str, door: Any, tmp_path: Path
) -> None:
    options, message = MISMATCHES[case]
    with pytest.raises(ArchitectureMismatchError, match=message) as caught:
        door(build(**options), save(build(), tmp_path / "a.pth"))
    assert "config of their training" in str(caught.value)


@pytest.mark.parametrize("door", [by_torch, by_resuming, by_checkpoint, by_plugin])
def test_part_of_the_weights_is_refused_by_name(door: Any, tmp_path: Path) -> None:
    trained = build()
    file = save(trained, tmp_path / "a.pth", record=False)
    checkpoint = torch.load(file, weights_only=True)
    del checkpoint["state_dict"]["backbone.model.conv1.conv.weight"]
    torch.save(checkpoint, file)
    with pytest.raises((ValueError, RuntimeError), match=r"model\.conv1\.conv\.weight"):
        door(build(seed=1), file)


@pytest.mark.parametrize("prefix", ["module.", "module.module.", "_orig_mod.module."])
@pytest.mark.parametrize("door", DOORS)
def test_wrapped_weights_load_behind_any_door(
    prefix: str, door: Any, tmp_path: Path
) -> None:
    trained, model = build(), build(seed=1)
    state = {prefix + name: tensor for name, tensor in trained.state_dict().items()}
    file = str(tmp_path / "a.pth")
    torch.save({"state_dict": state, "epoch": 3, "optimizer": {}}, file)
    door(model, file)
    assert torch.equal(model(images()), trained(images()))


def test_wrapped_model_loads_what_any_other_wrote(tmp_path: Path) -> None:
    trained = build()
    for written in (trained, nn.DataParallel(trained)):
        torch.save({"state_dict": written.state_dict(), "epoch": 3}, tmp_path / "a.pth")
        for door in (by_pretrained, by_resuming):
            model = build(seed=1)
            door(nn.DataParallel(model), str(tmp_path / "a.pth"))
            assert torch.equal(model(images()), trained(images()))


def test_plain_model_refuses_a_checkpoint_of_the_plugin(tmp_path: Path) -> None:
    """torchreid would load nothing, warn and continue with random weights."""
    file = save(build(), tmp_path / "own.pth")
    plain = torchreid.models.build_model(NAME, num_classes=1, pretrained=False)
    for door in (by_pretrained, by_resuming):
        with pytest.raises(ValueError, match=r"own\.pth .*selcon_NAME.*export --torchreid"):
            door(plain, file)


def test_plain_model_loads_plain_weights_as_before(tmp_path: Path) -> None:
    first, second = (
        torchreid.models.build_model(NAME, num_classes=classes, pretrained=False)
        for classes in (5, 7)
    )
    torch.save({"state_dict": first.state_dict()}, tmp_path / "a.pth")
    utils.load_pretrained_weights(second, str(tmp_path / "a.pth"))
    assert torch.equal(first.fc[0].weight, second.fc[0].weight)
    assert second.classifier.out_features == 7


def test_network_built_by_name_takes_over_what_it_does_not_know(tmp_path: Path) -> None:
    trained = build(num_parts=8, input_size=(128, 64))
    trained.global_distance_weight = 0.9
    model, crops = factory(), torch.randn(2, 3, 128, 64)
    by_pretrained(model, save(trained, tmp_path / "a.pth"))
    assert torch.equal(model(crops), trained(crops))
    manager = SimpleNamespace(
        height=64,
        width=32,
        transform_te=SimpleNamespace(
            transforms=[SimpleNamespace(mean=[0.5] * 3, std=[0.5] * 3)]
        ),
    )
    fit_to_method(model, "SelectiveContrastive", {"global_distance_weight": 0.3}, manager)
    known = model.architecture()
    assert (known["input_size"], known["global_weight"]) == ([64, 32], 0.3)
    assert known["pixel_mean"] == [127.5] * 3
    assert torch.equal(model.pixel_mean.flatten(), torch.full((3,), 127.5))


def test_architecture_is_data_and_survives_the_file(tmp_path: Path) -> None:
    trained = build()
    file = save(trained, tmp_path / "a.pth")
    assert read_network_file(file).architecture == trained.architecture()
    torch.save(trained.state_dict(), file)  # without the entry, the state dict has it
    assert read_network_file(file).architecture == trained.architecture()


def test_function_imported_before_the_plugin_is_guarded(tmp_path: Path) -> None:
    file = save(build(num_parts=0), tmp_path / "a.pth")
    script = f"""
import selcon_plugin.compat
torchreid = selcon_plugin.compat.import_torchreid()
from {torchreid.__name__}.utils import load_pretrained_weights
import selcon_plugin.torchreid_ext
model = torchreid.models.build_model("selcon_{NAME}", 0, pretrained=False, use_gpu=False)
load_pretrained_weights(model, {file!r})
print("parts", model.heads.num_parts)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert "parts 0" in done.stdout, done.stderr[-1000:]
