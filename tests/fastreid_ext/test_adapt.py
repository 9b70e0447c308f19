"""``selcon adapt`` of a network that FastReID trained with labels."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fastreid.config import CfgNode
from fastreid.modeling.meta_arch import build_model

from selcon_plugin.fastreid_ext import SelConTrainer
from selcon_plugin.fastreid_ext.hooks import MethodHook
from selcon_plugin.hosts import find_network
from selcon_plugin.inference.embedder import Embedder
from selcon_plugin.metrics.label_free import LabelFreeQuality
from selcon_plugin.workflows.adapt import AdaptSettings, adapt, training_config


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
        lambda *_, **__: LabelFreeQuality(next(values), 0.5, 2.0, 4, 0.0),
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


@pytest.mark.parametrize(
    ("backbone", "head"),
    [
        ({}, {"WITH_BNNECK": True}),
        ({}, {"WITH_BNNECK": False}),
        ({}, {"WITH_BNNECK": True, "EMBEDDING_DIM": 32, "NECK_FEAT": "before"}),
        ({}, {"EMBEDDING_DIM": 32, "POOL_LAYER": "GeneralizedMeanPooling"}),
        (
            {"NAME": "build_resnet_backbone", "DEPTH": "18x", "FEAT_DIM": 512},
            {"WITH_BNNECK": True, "EMBEDDING_DIM": 48, "NORM": "syncBN"},
        ),
    ],
    ids=["neck", "plain", "projection-neck", "projection", "resnet"],
)
def test_adaptation_begins_with_the_features_that_are_extracted(
    tiny_cfg: CfgNode, dataset_root: Path, tmp_path: Path, backbone: dict, head: dict
) -> None:
    cfg = tiny_cfg.clone()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.HEADS.NAME = "Baseline", "EmbeddingHead"
    cfg.MODEL.BACKBONE.PRETRAIN, cfg.MODEL.HEADS.NUM_CLASSES = False, 8
    cfg.MODEL.BACKBONE.FEAT_DIM = 96
    for node, values in ((cfg.MODEL.BACKBONE, backbone), (cfg.MODEL.HEADS, head)):
        node.update(values)
    torch.manual_seed(0)
    model = build_model(cfg)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
        elif name.endswith("num_batches_tracked"):
            buffer.fill_(5)
    weights = tmp_path / "supervised.pth"
    torch.save({"model": model.state_dict()}, weights)
    content = yaml.safe_load(cfg.dump())
    del content["MODEL"]["SELCON"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    folder = next(dataset_root.rglob("bounding_box_train"))
    settings = AdaptSettings(str(weights), str(folder), batch_size=8, device="cpu")
    network = find_network(weights)
    trainer = SelConTrainer(training_config(network, settings, tmp_path / "out"))
    trainer.resume_or_load(False)
    (hook,) = (hook for hook in trainer._hooks if isinstance(hook, MethodHook))
    hook.before_train()
    images = sorted(folder.glob("*.jpg"))[:8]
    extracted = Embedder.from_checkpoint(weights, device="cpu")(images)
    state = tmp_path / "start.pth"
    torch.save({"model": trainer.model.state_dict()}, state)
    started = network.host.load_network(trainer.cfg, state, torch.device("cpu"))
    np.testing.assert_allclose(Embedder(started)(images), extracted, atol=1e-5)
    assert extracted.shape[1] == head.get("EMBEDDING_DIM", 96)
