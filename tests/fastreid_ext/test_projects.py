"""Heads, config keys and scripts of the kind that FastReID's projects have."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fastreid.config import CfgNode, get_cfg
from fastreid.layers.weight_init import weights_init_kaiming
from fastreid.modeling.heads import REID_HEADS_REGISTRY, EmbeddingHead
from fastreid.modeling.meta_arch import META_ARCH_REGISTRY, build_model
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.checkpoints import assert_equal
from helpers.programs import environment, run_program
from helpers.trainers import trained
from selcon_plugin.cli.main import main
from selcon_plugin.config import importing
from selcon_plugin.config.importing import add_imported_keys, import_files
from selcon_plugin.fastreid_ext import SelConTrainer
from selcon_plugin.fastreid_ext.config import complete_config, default_config
from selcon_plugin.fastreid_ext.embedding import unwrap
from selcon_plugin.fastreid_ext.inference import load_network
from selcon_plugin.features import Embeddings

SIZE = (64, 32)


@REID_HEADS_REGISTRY.register()
class PlainHead(EmbeddingHead):
    """FastReID's own head under another name."""


@REID_HEADS_REGISTRY.register()
class WithoutClassifierHead(EmbeddingHead):
    """A head that returns the feature in both modes, as with partial classification."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        del self.weight

    def forward(self, features: Tensor, targets: Any = None) -> Any:
        return self.bottleneck(self.pool_layer(features))[..., 0, 0]


@REID_HEADS_REGISTRY.register()
class SeveralHead(EmbeddingHead):
    """A head with a second branch that the test also compares."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.branch = nn.Linear(cfg.MODEL.BACKBONE.FEAT_DIM, 12)

    def forward(self, features: Tensor, targets: Any = None) -> Any:
        pooled = self.pool_layer(features)
        first = self.branch(pooled[..., 0, 0])
        if not self.training:
            return first, features.flatten(2), first.sigmoid()
        return {"cls_outputs": F.linear(self.bottleneck(pooled)[..., 0, 0], self.weight)}


@REID_HEADS_REGISTRY.register()
class FromScratchHead(nn.Module):
    """A head that is derived from no other one, with the axes of the pooled map."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.layer = nn.Conv2d(cfg.MODEL.BACKBONE.FEAT_DIM, 20, 1)

    def forward(self, features: Tensor, targets: Any = None) -> Any:
        return self.layer(F.adaptive_avg_pool2d(features, 1))


@REID_HEADS_REGISTRY.register()
class NamedOutputsHead(FromScratchHead):
    """A head that returns its outputs by name."""

    def forward(self, features: Tensor, targets: Any = None) -> Any:
        feature = super().forward(features)[..., 0, 0]
        return {"features": feature, "cls_outputs": feature}


@REID_HEADS_REGISTRY.register()
class AttributesHead(EmbeddingHead):
    """A head whose output is a score of each class."""

    def forward(self, features: Tensor, targets: Any = None) -> Any:
        pooled = self.bottleneck(self.pool_layer(features))[..., 0, 0]
        scores = F.linear(pooled, self.weight)
        return {"cls_outputs": scores} if self.training else scores.sigmoid()


class OfOneClassHead(EmbeddingHead):
    """A head with a layer of its classifier that needs a class, as in FastAttr."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.bnneck = nn.BatchNorm1d(cfg.MODEL.HEADS.NUM_CLASSES)
        self.bnneck.apply(weights_init_kaiming)

    def scores(self, features: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.bottleneck(self.pool_layer(features))[..., 0, 0]
        return feature, self.bnneck(F.linear(feature, self.weight))


@REID_HEADS_REGISTRY.register()
class NormalizedAttributesHead(OfOneClassHead):
    """A head whose output is a score of each class, with a normalization of the scores."""

    def forward(self, features: Tensor, targets: Any = None) -> Any:
        return self.scores(features)[1].sigmoid()


@REID_HEADS_REGISTRY.register()
class NormalizedScoresHead(OfOneClassHead):
    """A head that normalizes its scores, but returns the feature."""

    def forward(self, features: Tensor, targets: Any = None) -> Any:
        return self.scores(features)[0]


@REID_HEADS_REGISTRY.register()
class MapHead(FromScratchHead):
    """A head that returns a map."""

    def forward(self, features: Tensor, targets: Any = None) -> Any:
        return self.layer(features)


@REID_HEADS_REGISTRY.register()
class OwnKeysHead(EmbeddingHead):
    """A head that needs a key of its project."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.ratio = cfg.MODEL.HEADS.OWN.RATIO


@REID_HEADS_REGISTRY.register()
class OwnEmbeddingsHead(FromScratchHead):
    """A head that returns embeddings, but not their sizes."""

    def forward(self, features: Tensor, targets: Any = None) -> Any:
        vectors = F.normalize(super().forward(features).flatten(1))
        return Embeddings(vectors, F.normalize(vectors.view(-1, 2, 10), dim=2))


GLOBAL_HEADS = {
    "PlainHead": 96,
    "WithoutClassifierHead": 96,
    "SeveralHead": 12,
    "FromScratchHead": 20,
    "NamedOutputsHead": 20,
    "NormalizedScoresHead": 96,
}


def with_head(cfg: CfgNode, name: str) -> CfgNode:
    cfg.MODEL.HEADS.NAME = name
    cfg.MODEL.HEADS.NORM = "BN"
    cfg.MODEL.HEADS.WITH_BNNECK = True
    return cfg


@pytest.mark.parametrize("name", GLOBAL_HEADS)
def test_head_without_parts_trains_its_global_feature(
    tiny_cfg: CfgNode, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = with_head(tiny_cfg, name)
    cfg.SOLVER.MAX_EPOCH = 1
    with caplog.at_level(logging.INFO):
        trainer = trained(cfg)
    model: Any = unwrap(trainer.model)
    assert (model.heads.num_parts, model.method.num_images) == (0, 40)
    lines = [r.getMessage() for r in caplog.records if "NUM_PARTS 0" in r.getMessage()]
    assert len(lines) == 1
    assert f"MODEL.HEADS.NAME {name}" in lines[0]
    assert ("the first of the 3" in lines[0]) == (name == "SeveralHead")
    assert model.heads.global_dim == GLOBAL_HEADS[name]
    # Only what changes the feature is trained, and all of it.
    before = build_model(complete_config(cfg)).state_dict()
    assert all(p.grad is not None for p in model.heads.parameters() if p.requires_grad), (
        before.keys()
    )
    network = load_network(
        complete_config(cfg), Path(cfg.OUTPUT_DIR, "model_final.pth"), torch.device("cpu")
    )
    images = torch.rand(3, 3, *SIZE) * 255
    model.eval()
    expected = model(images)
    assert torch.allclose(network(model._normalize(images)), expected, atol=1e-5)
    assert torch.allclose(expected.norm(dim=1), torch.ones(3), atol=1e-5)


@pytest.mark.parametrize("name", ["PlainHead", "SeveralHead"])
def test_run_with_such_a_head_resumes_bit_identical(
    tiny_cfg: CfgNode, tmp_path: Path, name: str
) -> None:
    cfg = with_head(tiny_cfg, name)
    cfg.MODEL.SELCON.EMA_DECAY = 0.9
    unbroken = unwrap(trained(cfg).model).state_dict()
    for file in ("model_final.pth", "model_best.pth"):
        Path(cfg.OUTPUT_DIR, file).unlink(missing_ok=True)
    Path(cfg.OUTPUT_DIR, "last_checkpoint").write_text("model_0000.pth")
    resumed = trained(cfg, resume=True)
    assert resumed.start_epoch == 1
    assert_equal(dict(unbroken), dict(unwrap(resumed.model).state_dict()))


def test_weights_of_the_host_fit_a_head_of_its_kind(
    tiny_cfg: CfgNode, tmp_path: Path
) -> None:
    cfg = complete_config(with_head(tiny_cfg, "PlainHead"))
    cfg.defrost()
    host = cfg.clone()
    host.MODEL.META_ARCHITECTURE, host.MODEL.HEADS.NUM_CLASSES = "Baseline", 7
    model: Any = build_model(cfg)
    host.MODEL.BACKBONE.FEAT_DIM = model.heads.global_dim
    baseline = META_ARCH_REGISTRY.get("Baseline")(host).eval()
    file = tmp_path / "host.pth"
    torch.save({"model": baseline.state_dict()}, file)
    cfg.MODEL.WEIGHTS, cfg.SOLVER.MAX_EPOCH = str(file), 1
    trainer = SelConTrainer(cfg, show_progress=False)
    trainer.resume_or_load(False)
    images = torch.rand(3, 3, *SIZE) * 255
    found = unwrap(trainer.model).eval()(images)
    with torch.no_grad():
        expected = F.normalize(baseline({"images": images.clone()}))
    assert torch.allclose(found, expected, atol=1e-5)


def test_head_that_flattens_the_map_gets_all_of_it(tiny_cfg: CfgNode) -> None:
    tiny_cfg.MODEL.HEADS.POOL_LAYER = "Flatten"
    tiny_cfg.MODEL.HEADS.EMBEDDING_DIM = 16
    model: Any = build_model(with_head(tiny_cfg, "PlainHead"))
    assert model.heads.global_dim == 16
    assert model.heads.bottleneck[0].in_channels == 96 * 4 * 2
    maps = torch.rand(2, 96, 4, 2).to(memory_format=torch.channels_last)
    assert model.apply_head(model.heads, maps).global_features.shape == (2, 16)


def test_head_of_embeddings_is_described(tiny_cfg: CfgNode) -> None:
    model: Any = build_model(with_head(tiny_cfg, "OwnEmbeddingsHead"))
    head = model.heads
    assert (head.global_dim, head.num_parts, head.part_dim) == (20, 2, 10)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("AttributesHead", r"AttributesHead.*score.*NUM_CLASSES.*GlobalPartHead"),
        ("NormalizedAttributesHead", r"score.*NUM_CLASSES.*GlobalPartHead"),
        ("MapHead", r"MapHead.*shape \(2, 20, \d+, \d+\)"),
        ("OwnKeysHead", r"OwnKeysHead.*OWN"),
        ("ClasHead", r"ClasHead.*GlobalPartHead"),
    ],
)
def test_head_without_a_feature_is_refused(
    tiny_cfg: CfgNode, name: str, words: str
) -> None:
    with pytest.raises(ValueError, match=rf"MODEL\.HEADS\.NAME.*{words}") as raised:
        build_model(with_head(tiny_cfg, name))
    assert "\n" not in str(raised.value)


PROJECT = {
    "fastown/__init__.py": """
from .config import add_own_config
from .head import OwnHead
""",
    "fastown/config.py": """
from fastreid.config import CfgNode as CN

def add_own_config(cfg):
    cfg.MODEL.HEADS.OWN = CN({"RATIO": 0.5})
    cfg.TEST.RECALLS = [1, 2, 4]
""",
    "fastown/head.py": """
from fastreid.modeling.heads import REID_HEADS_REGISTRY, EmbeddingHead

@REID_HEADS_REGISTRY.register()
class OwnHead(EmbeddingHead):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.ratio = cfg.MODEL.HEADS.OWN.RATIO
""",
    "train_net.py": """
import sys
from collections import OrderedDict

sys.path.append('.')

from fastreid.config import get_cfg
from fastreid.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from fastreid.evaluation import DatasetEvaluator

from fastown import *


class Evaluator(DatasetEvaluator):
    def __init__(self, cfg):
        self.recalls, self.num = cfg.TEST.RECALLS, 0

    def reset(self):
        self.num = 0

    def process(self, inputs, outputs):
        self.num += len(outputs)

    def evaluate(self):
        found = OrderedDict((f"Recall@{k}", float(k)) for k in self.recalls)
        found["metric"] = float(self.num)
        return found


class Trainer(DefaultTrainer):
    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_dir=None):
        loader, num_query = cls.build_test_loader(cfg, dataset_name)
        return loader, Evaluator(cfg)


def main(args):
    cfg = get_cfg()
    add_own_config(cfg)
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    numbers = (args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
    launch(main, *numbers, args=(args,))
""",
    "own.yml": """
MODEL:
  META_ARCHITECTURE: SelCon
  HEADS:
    NAME: OwnHead
    OWN:
      RATIO: 0.25
TEST:
  RECALLS: [1, 8]
""",
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in the form of one of FastReID's projects, which a test may import."""
    for name, text in PROJECT.items():
        file = tmp_path / "projects" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr(importing, "_imported", {})
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path / "projects"
    for name in [n for n in sys.modules if n.partition(".")[0] in ("fastown", "train_net")]:
        del sys.modules[name]
    REID_HEADS_REGISTRY._obj_map.pop("OwnHead", None)


def options(values: dict[str, Any]) -> list[str]:
    return [word for key, value in values.items() for word in (key, str(value))]


@pytest.mark.parametrize("name", ["train_net.py", "fastown", "fastown/__init__.py"])
def test_import_brings_head_and_keys_of_a_project(
    project: Path, tiny_values: dict[str, Any], tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "out"
    values = options(tiny_values | {"OUTPUT_DIR": folder, "SOLVER.MAX_EPOCH": 1})
    command = ["--import", str(project / name), "--config-file", str(project / "own.yml")]
    assert main(["train", *command, *values]) == 0
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["MODEL"]["HEADS"]["OWN"] == {"RATIO": 0.25}
    assert written["TEST"]["RECALLS"] == [1, 8]
    log = (folder / "log.txt").read_text()
    assert "MODEL.HEADS.NAME OwnHead has no parts" in log
    assert "OWN" not in "".join(
        line for line in log.splitlines() if "no effect in this run" in line
    )
    weights = ["MODEL.WEIGHTS", str(folder / "model_final.pth")]
    run = ["--import", str(project / name), "--config-file", str(folder / "config.yaml")]
    assert main(["eval", *run, *weights]) == 0


def test_keys_of_a_project_are_checked(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ["--config-file", str(project / "own.yml")]
    assert main(["train", *config]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "MODEL.HEADS.OWN" in error
    assert "--import" in error
    config += ["--import", str(project / "fastown")]
    assert main(["train", *config, "TEST.RECALLS", "many"]) == 2
    assert "TEST.RECALLS" in capsys.readouterr().err.splitlines()[-1]
    assert main(["train", *config, "MODEL.HEADS.OWN.RATO", "1.0"]) == 2
    assert "mean MODEL.HEADS.OWN.RATIO" in capsys.readouterr().err.splitlines()[-1]


def test_keys_are_added_once_to_defaults_only(project: Path) -> None:
    import_files([str(project / "fastown"), str(project / "train_net.py")])
    import_files([str(project / "fastown")])
    assert default_config().TEST.RECALLS == [1, 2, 4]
    assert "RECALLS" not in get_cfg().TEST


def test_import_prepares_the_host_that_a_file_names(
    project: Path,
) -> None:
    # In a process that has not imported FastReID, which fails without preparation.
    code = f"""
import sys
from selcon_plugin.config.importing import import_files
import_files([{str(project / "fastown")!r}, {str(project / "train_net.py")!r}])
print(sys.modules["train_net"].Trainer.__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "Trainer"), done.stderr


def test_failing_function_is_named(project: Path) -> None:
    file = project / "broken_keys.py"
    file.write_text("def add_broken_cfg(cfg):\n    cfg.NOWHERE.KEY = 1\n")
    import_files([str(file)])
    with pytest.raises(ValueError, match=r"broken_keys\.py.*add_broken_cfg.*NOWHERE"):
        add_imported_keys(get_cfg())


def test_script_of_a_project_runs_unedited(
    project: Path, tiny_values: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    values = options(tiny_values | {"OUTPUT_DIR": folder, "SOLVER.MAX_EPOCH": 1})
    script = [project / "train_net.py", "--config-file", project / "own.yml"]
    done = run_program("-m", "selcon_plugin", "run", *script, *values)
    assert done.returncode == 0, done.stderr
    assert "Recall@8" in done.stdout + (folder / "log.txt").read_text()
    again = run_program("-m", "selcon_plugin", "run", *script, "--resume", *values)
    assert again.returncode == 0, again.stderr
    assert "complete" in again.stdout + (folder / "log.txt").read_text()
