"""Networks that leave the plugin for FastReID, and FastReID's own that come in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fastreid.config import CfgNode, get_cfg
from fastreid.modeling.meta_arch import build_model

from helpers.plain_hosts import as_market, map_by_host_only
from selcon_plugin.cli.main import main
from selcon_plugin.fastreid_ext import SelCon, add_selcon_config
from selcon_plugin.fastreid_ext.checkpoint import SelConCheckpointer
from selcon_plugin.fastreid_ext.config import complete_config
from selcon_plugin.fastreid_ext.inference import load_network
from selcon_plugin.fastreid_ext.plain import measure, plain_network

R18 = {
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.BACKBONE.DEPTH": "18x",
    "MODEL.BACKBONE.FEAT_DIM": 512,
    "MODEL.SELCON.NUM_PARTS": 0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "width": {"MODEL.HEADS.EMBEDDING_DIM": 48},
    "no projection": {"MODEL.SELCON.PROJECT_GLOBAL": False},
    "neck": {"MODEL.HEADS.WITH_BNNECK": True},
    "learned exponent": {"MODEL.HEADS.POOL_LAYER": "GeneralizedMeanPoolingP"},
    "fixed exponent": {"MODEL.HEADS.POOL_LAYER": "GeneralizedMeanPooling"},
    "sync": {"MODEL.HEADS.NORM": "syncBN"},
    "wave block": {"MODEL.SELCON.WAVE_BLOCK": "plain"},
    "stride": {"MODEL.BACKBONE.LAST_STRIDE": 2},
    "teacher": {"MODEL.SELCON.EMA_DECAY": 0.9},
    "normalization": {"MODEL.PIXEL_MEAN": [127.5] * 3, "MODEL.PIXEL_STD": [127.5] * 3},
}


def configured(tiny_cfg: CfgNode, **values: Any) -> CfgNode:
    cfg = tiny_cfg.clone()
    for key, value in (R18 | values).items():
        cfg.merge_from_list([key, value])
    return complete_config(cfg)


def save(cfg: CfgNode, folder: Path) -> Path:
    """Leave what a run leaves: weights with statistics, and a config."""
    torch.manual_seed(0)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.HEADS.NUM_CLASSES = 0
    model = SelCon(cfg).train()
    with torch.no_grad():
        model.embed(torch.rand(16, 3, *cfg.INPUT.SIZE_TRAIN) * 255)
        for parameter in model.heads.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # biases too
    model.update_teacher(restart=True)
    folder.mkdir()
    (folder / "config.yaml").write_text(cfg.dump())
    weights = folder / "model_final.pth"
    torch.save({"model": model.state_dict()}, weights)
    return weights


def images() -> torch.Tensor:
    return torch.randn(4, 3, 64, 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", VARIANTS)
def test_own_baseline_has_the_features_of_the_network(
    name: str, tiny_cfg: CfgNode, tmp_path: Path
) -> None:
    cfg = configured(tiny_cfg, **VARIANTS[name])
    plain = plain_network(cfg, save(cfg, tmp_path / "run"), global_only=False)
    with torch.no_grad():
        expected, found = plain.trained(images()), plain.network(images())
    assert torch.allclose(found, expected, atol=1e-6)
    assert plain.whole
    get_cfg().merge_from_other_cfg(plain.config)  # only keys of FastReID
    assert plain.config.MODEL.META_ARCHITECTURE == "Baseline"
    assert plain.config.MODEL.HEADS.NAME == "EmbeddingHead"


def test_only_fastreid_evaluates_the_export_to_the_same_map(
    tiny_cfg: CfgNode, synthetic_persons: Path, tmp_path: Path, capsys: Any
) -> None:
    cfg = configured(tiny_cfg)
    weights, folder = save(cfg, tmp_path / "run"), tmp_path / "plain"
    assert main(["export", "--weights", str(weights), "--fastreid", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "largest difference" in printed
    assert "DATASETS.TESTS has none of this plugin's" in printed
    (expected,) = measure(cfg, load_network(cfg, weights, torch.device("cpu"))).values()
    market = as_market(synthetic_persons, tmp_path / "market")
    found = map_by_host_only("fastreid", folder, market)
    assert found == pytest.approx(expected["mAP"], abs=1e-4)  # in percent
    assert "SELCON" not in yaml.safe_load((folder / "config.yaml").read_text())["MODEL"]


def test_parts_are_refused_or_left_out_with_their_map(
    tiny_cfg: CfgNode, tmp_path: Path, capsys: Any
) -> None:
    cfg = configured(tiny_cfg, **{"MODEL.SELCON.NUM_PARTS": 2})
    weights, folder = save(cfg, tmp_path / "run"), tmp_path / "plain"
    command = ["export", "--weights", str(weights), "--fastreid", str(folder)]
    assert main(command) == 2
    assert "2 parts" in (error := capsys.readouterr().err)
    assert "--global-only" in error
    assert not folder.exists()
    assert main([*command, "--global-only"]) == 0
    printed = capsys.readouterr().out
    (whole,) = measure(cfg, load_network(cfg, weights, torch.device("cpu"))).values()
    assert f"of the whole network {whole['mAP']:.4f}" in printed


def test_what_fastreid_cannot_express_is_refused(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    for number, (values, message) in enumerate(
        [
            ({"MODEL.BACKBONE.NAME": "build_timm_backbone"}, "build_timm_backbone.*--onnx"),
            ({"MODEL.SELCON.WAVE_BLOCK": "attentive"}, "WAVE_BLOCK attentive.*--onnx"),
        ]
    ):
        cfg = configured(tiny_cfg, **values)
        weights = save(cfg, tmp_path / str(number))
        with pytest.raises(ValueError, match=message):
            plain_network(cfg, weights, global_only=False)


SUPERVISED: dict[str, dict[str, Any]] = {
    "neck": {"MODEL.HEADS.WITH_BNNECK": True},
    "no neck": {"MODEL.HEADS.WITH_BNNECK": False},
    "projection": {"MODEL.HEADS.WITH_BNNECK": True, "MODEL.HEADS.EMBEDDING_DIM": 48},
    "exponent": {"MODEL.HEADS.POOL_LAYER": "GeneralizedMeanPoolingP"},
}


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("name", SUPERVISED)
def test_supervised_checkpoint_comes_in_with_its_neck(
    name: str, project: bool, tmp_path: Path
) -> None:
    """FastReID's features, of unit length, are those of the network at its start."""
    if name == "projection" and not project:
        pytest.skip("a projection needs one")
    cfg = add_selcon_config(get_cfg())
    values = {**R18, **SUPERVISED[name], "MODEL.HEADS.NUM_CLASSES": 7}
    values |= {"INPUT.SIZE_TRAIN": [64, 32], "MODEL.DEVICE": "cpu"}
    for key, value in values.items():
        cfg.merge_from_list([key, value])
    torch.manual_seed(1)
    supervised = build_model(cfg).train()
    with torch.no_grad():
        supervised.heads(
            supervised.backbone(torch.randn(16, 3, 64, 32)), torch.zeros(16).long()
        )
        expected = supervised.eval().heads(supervised.backbone(images()))
    file = tmp_path / "supervised.pth"
    torch.save({"model": supervised.state_dict()}, file)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.HEADS.NUM_CLASSES = "SelCon", 0
    cfg.MODEL.SELCON.PROJECT_GLOBAL = project
    model = SelCon(complete_config(cfg)).eval()
    model.images_normalized = True
    SelConCheckpointer(model).resume_or_load(str(file), resume=False)
    with torch.no_grad():
        found = model.test_feature(model.embed(images()))
    expected = torch.nn.functional.normalize(expected)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_supervised_checkpoint_without_the_parts_is_refused_for_an_evaluation(
    tiny_cfg: CfgNode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = configured(tiny_cfg)
    weights = save(cfg, tmp_path / "run")
    cfg = configured(tiny_cfg, **{"MODEL.SELCON.NUM_PARTS": 2})
    cfg.MODEL.HEADS.NUM_CLASSES = 0
    state = torch.load(weights, weights_only=True)["model"]
    torch.save({"model": dict(state)}, weights)  # without its description
    with pytest.raises(ValueError, match=r"model_final.*heads\.part_weight"):
        SelConCheckpointer(SelCon(cfg)).resume_or_load(str(weights), resume=False)
    model = SelCon(cfg)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = SelConCheckpointer(model, optimizer=optimizer)
    training.resume_or_load(str(weights), resume=False)
    assert "heads.part_weight" in caplog.text
