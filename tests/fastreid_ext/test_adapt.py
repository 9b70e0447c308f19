"""``selcon adapt`` of a network that FastReID trained with labels."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fastreid.config import CfgNode
from fastreid.modeling.meta_arch import build_model

from selcon_plugin.inference.embedder import Embedder
from selcon_plugin.metrics.label_free import LabelFreeQuality
from selcon_plugin.workflows.adapt import AdaptSettings, adapt


def test_network_trained_with_labels_is_adapted(
    dataset_root: Path, tiny_cfg: CfgNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = next(dataset_root.rglob("bounding_box_train"))
    # A config and a checkpoint as FastReID's own training leaves them.
    cfg = tiny_cfg.clone()
    cfg.MODEL.META_ARCHITECTURE = "Baseline"
    cfg.MODEL.HEADS.NAME = "EmbeddingHead"
    cfg.MODEL.HEADS.NUM_CLASSES = 8
    torch.manual_seed(0)
    weights = tmp_path / "supervised.pth"
    torch.save({"model": build_model(cfg).state_dict()}, weights)
    content = yaml.safe_load(cfg.dump())
    del content["MODEL"]["SELCON"]
    config = tmp_path / "supervised.yml"
    config.write_text(yaml.safe_dump(content))

    values = iter([0.1, 0.2])
    monkeypatch.setattr(
        "selcon_plugin.workflows.adapt.label_free_quality",
        lambda _: LabelFreeQuality(next(values), 0.5, 0.5, 0.5, 0.5, 4, 0.0),
    )
    settings = AdaptSettings(
        str(weights),
        str(folder),
        config_file=str(config),
        epochs=1,
        batch_size=8,
        device="cpu",
        options=("MODEL.SELCON.ITERS_PER_EPOCH", "2"),
    )
    result = adapt(settings, tmp_path / "out")
    assert result.improved
    written = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert written["MODEL"]["META_ARCHITECTURE"] == "SelCon"
    assert written["MODEL"]["SELCON"]["METHOD"] == "SelConCluster"
    assert json.loads((tmp_path / "out" / "adapt.json").read_text())["best_epochs"] == 1
    adapted = Embedder.from_checkpoint(result.file, device="cpu")
    trained = Embedder.from_checkpoint(
        tmp_path / "out" / "training" / "model_final.pth", device="cpu"
    )
    images = sorted(folder.glob("*.jpg"))[:4]
    np.testing.assert_array_equal(adapted(images), trained(images))
