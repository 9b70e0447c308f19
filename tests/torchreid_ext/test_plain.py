"""Networks that leave the plugin for torchreid, and torchreid's own that come in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.plain_hosts import as_market, map_by_host_only
from helpers.tiny import SPEC, TORCHREID
from selcon_plugin.cli.main import main
from selcon_plugin.compat import import_torchreid
from selcon_plugin.datasets import generate_synthetic_persons
from selcon_plugin.hosts import get_host
from selcon_plugin.torchreid_ext.plain import plain_network
from selcon_plugin.torchreid_ext.train import build_model
from selcon_plugin.torchreid_ext.weights import load_network

torchreid = import_torchreid()
# Models whose feature is the pooled map, a layer behind it, and several pieces.
MODELS = ["osnet_x0_25", "resnet18", "resnet50_fc512", "mlfn", "shufflenet_v2_x0_5"]


def config(name: str, **values: Any) -> Any:
    given = TORCHREID | {"model.name": name, "selcon.method": "ClusterContrast"}
    given |= {"selcon.feature": "model", "selcon.num_parts": 0} | values
    return get_host("torchreid").load_config(overrides=given)


def train_a_little(cfg: Any, folder: Path) -> Path:
    """Leave what a run leaves: weights with statistics, and a config."""
    torch.manual_seed(0)
    model = build_model(cfg).train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            # The mean over the batches: with statistics that are far from those of the
            # images, a deep network gives all of them one feature, and ties rank.
            module.momentum = None
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, cfg.data.height, cfg.data.width))
    folder.mkdir()
    (folder / "config.yaml").write_text(cfg.dump())
    weights = folder / "model.pth.tar-1"
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, weights)
    return weights


@pytest.mark.parametrize("name", MODELS)
def test_plain_model_has_the_features_of_the_network(name: str, tmp_path: Path) -> None:
    cfg = config(name)
    plain = plain_network(cfg, train_a_little(cfg, tmp_path / "run"))
    images = torch.randn(4, 3, 64, 32)
    with torch.no_grad():
        assert torch.allclose(plain.network(images), plain.trained(images), atol=1e-6)
    assert "selcon" not in plain.config


@pytest.mark.parametrize(
    "name",
    ["osnet_x0_25", *(pytest.param(n, marks=pytest.mark.slow) for n in MODELS[1:])],
)
def test_only_torchreid_evaluates_the_export_to_the_same_map(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    synthetic = generate_synthetic_persons(tmp_path / "data", SPEC)
    market = as_market(synthetic, tmp_path / "market")
    sets = {"data.sources": "['market1501']", "data.targets": "['market1501']"}
    cfg = config(name, **sets, **{"data.root": str(market)})
    weights, folder = train_a_little(cfg, tmp_path / "run"), tmp_path / "plain"
    assert main(["export", "--weights", str(weights), "--torchreid", str(folder)]) == 0
    assert "largest difference" in capsys.readouterr().out
    cfg.defrost()
    cfg.model.load_weights, cfg.data.save_dir = str(weights), str(tmp_path / "eval")
    (expected,) = get_host("torchreid").evaluate(cfg).values()
    found = map_by_host_only("torchreid", folder, market)
    assert found == pytest.approx(expected["mAP"], abs=1e-4)  # in percent
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["name"] == name


def test_head_that_torchreid_lacks_is_refused_with_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config("osnet_x0_25", **{"selcon.feature": "head"})
    weights = str(train_a_little(cfg, tmp_path / "run"))
    for host, named in {
        "torchreid": ["osnet_x0_25", "selcon.feature model", "--onnx"],
        "fastreid": ["network of torchreid", "--torchreid instead of --fastreid"],
    }.items():
        folder = tmp_path / host
        assert main(["export", "--weights", weights, f"--{host}", str(folder)]) == 2
        error = capsys.readouterr().err
        assert all(word in error for word in named), error
        assert not folder.exists()


@pytest.mark.parametrize("name", ["osnet_x0_25", "resnet18"])
def test_checkpoint_of_torchreid_comes_in_with_its_own_features(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    plain = torchreid.models.build_model(name, num_classes=5, pretrained=False).train()
    images = torch.randn(8, 3, 64, 32)
    with torch.no_grad():
        plain(images)
        expected = torch.nn.functional.normalize(plain.eval()(images))
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "plain.pth")
    model = build_model(config(name)).eval()
    load_network(model, tmp_path / "plain.pth")
    with torch.no_grad():
        assert torch.allclose(model(images), expected, atol=1e-6)
