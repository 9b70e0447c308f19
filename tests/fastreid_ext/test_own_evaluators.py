"""Evaluators of a project get the outputs of its head; they are tried before a training."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from fastreid.config import CfgNode
from fastreid.engine import DefaultTrainer
from fastreid.evaluation import DatasetEvaluator, ReidEvaluator
from fastreid.modeling.heads import REID_HEADS_REGISTRY, EmbeddingHead
from torch import Tensor
from torch.nn import functional as F

from helpers.programs import environment
from selcon_plugin.fastreid_ext import SelConTrainer
from selcon_plugin.fastreid_ext.own_evaluators import few_images


@REID_HEADS_REGISTRY.register()
class FeatureAndMapHead(EmbeddingHead):
    """A head that its project compares by two outputs, as in PartialReID."""

    def forward(self, features: Tensor, targets: Any = None) -> Any:
        pooled = self.bottleneck(self.pool_layer(features))[..., 0, 0]
        return pooled, features.flatten(2)


class TwoOutputsEvaluator(DatasetEvaluator):
    """Keeps the shapes of both outputs, and fails where a test asks for it."""

    fails_in = ""
    seen: list[tuple[int, ...]]

    def reset(self) -> None:
        self.seen = []

    def process(self, inputs: Any, outputs: Any) -> None:
        if self.fails_in == "process":
            torch.zeros(2).view(3)
        F.normalize(outputs[0])
        self.seen += [tuple(output.shape) for output in outputs]

    def evaluate(self) -> Any:
        if self.fails_in == "evaluate":
            raise KeyError("Recall@7")
        num_images = float(sum(shape[0] for shape in self.seen[::2]))
        return OrderedDict(metric=num_images, rows=float(self.seen[1][2]))


class Trainer(DefaultTrainer):
    """A trainer of a project, which FastReID's documentation suggests to write so."""

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_dir: str | None = None
    ) -> Any:
        loader, _ = cls.build_test_loader(cfg, dataset_name)
        return loader, TwoOutputsEvaluator()


class OwnReidTrainer(DefaultTrainer):
    """A trainer that builds FastReID's evaluator itself."""

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_dir: str | None = None
    ) -> Any:
        loader, num_query = cls.build_test_loader(cfg, dataset_name)
        return loader, ReidEvaluator(cfg, num_query, output_dir)


@pytest.fixture
def cfg(tiny_cfg: CfgNode) -> CfgNode:
    tiny_cfg.MODEL.HEADS.NAME = "FeatureAndMapHead"
    tiny_cfg.MODEL.HEADS.NORM = "BN"
    tiny_cfg.MODEL.HEADS.WITH_BNNECK = True
    tiny_cfg.SOLVER.MAX_EPOCH = 1
    return tiny_cfg


def test_evaluator_of_a_project_gets_all_outputs_of_its_head(cfg: CfgNode) -> None:
    trainer: Any = Trainer(cfg)
    trainer.resume_or_load(False)
    results = trainer.train()
    images = len(trainer.build_test_loader(trainer.cfg, "SyntheticPersons")[0].dataset)
    assert dict(results) == {"metric": images, "rows": 4 * 2}
    # Another evaluation of the same network takes one vector.
    found: Any = SelConTrainer.test(trainer.cfg, trainer.model)
    own: Any = OwnReidTrainer(cfg)
    assert found == type(own).test(trainer.cfg, trainer.model)


@pytest.mark.parametrize(
    ("step", "words"), [("process", "RuntimeError.*invalid"), ("evaluate", "Recall@7")]
)
def test_evaluator_that_fails_stops_before_the_training(
    cfg: CfgNode, monkeypatch: pytest.MonkeyPatch, step: str, words: str
) -> None:
    monkeypatch.setattr(TwoOutputsEvaluator, "fails_in", step)
    match = rf"DATASETS\.TESTS SyntheticPersons: TwoOutputsEvaluator.*{words}.*\(\)"
    with pytest.raises(ValueError, match=match) as raised:
        Trainer(cfg)
    assert Path(__file__).name in str(raised.value)
    assert not any(Path(cfg.OUTPUT_DIR).glob("*"))


def test_rehearsal_leaves_the_run_as_it_is(cfg: CfgNode) -> None:
    state = torch.get_rng_state()
    trainer: Any = Trainer(cfg)
    assert trainer.model.training
    again: Any = SelConTrainer(cfg)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert not any(Path(cfg.OUTPUT_DIR).glob("*"))
    torch.set_rng_state(state)


def items(persons: range, cameras: range, copies: int = 1) -> list[tuple[str, int, int]]:
    return [(f"{p}_{c}_{k}", p, c) for p in persons for c in cameras for k in range(copies)]


def test_few_images_hold_matches() -> None:
    # Persons 0..19 have no match: their camera is the same in query and gallery.
    query = items(range(60), range(1))
    gallery = items(range(20), range(1)) + items(range(20, 60), range(1, 3), 3)
    some_query, some_gallery = few_images(query, gallery)
    assert (len(some_query), len(some_gallery)) == (60, 64)
    assert {q[1] for q in some_query[:8]} == set(range(20, 28))
    assert sum(g[1] in range(20, 28) for g in some_gallery) == 8 * 6
    # Queries that are compared with each other, as in FastRetri.
    unique, pairs = items(range(10), range(1)), items(range(10, 99), range(2))
    only, none = few_images(unique + pairs, [])
    assert none == []
    assert len(only) == 64
    assert [q[1] for q in only[:16]] == [p for p in range(10, 18) for _ in range(2)]
    # A small test set stays whole.
    assert few_images(query[:5], gallery[:50]) == (query[:5], gallery[:50])


def test_names_of_faiss_on_a_gpu_search_on_a_cpu() -> None:
    faiss = pytest.importorskip("faiss")
    if hasattr(faiss, "StandardGpuResources"):
        pytest.skip("this faiss has them")
    # As FastRetri's evaluator does, in a process that ends with the changed names.
    code = """
import numpy as np
from selcon_plugin.compat.faiss import offer_gpu_names
offer_gpu_names()
import faiss
resources, config = faiss.StandardGpuResources(), faiss.GpuIndexFlatConfig()
config.device = 0
points = np.random.default_rng(0).normal(size=(20, 4)).astype("float32")
for kind, score in (
    (faiss.GpuIndexFlatIP, -points @ points.T),
    (faiss.GpuIndexFlatL2, ((points[:, None] - points) ** 2).sum(2)),
):
    index = kind(resources, 4, config)
    index.add(points)
    assert (index.search(points, 3)[1] == score.argsort(1)[:, :3]).all()
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_network_returns_one_vector_outside_of_such_an_evaluation(cfg: CfgNode) -> None:
    network: Any = Trainer(cfg).model.eval()
    images = torch.rand(2, 3, 64, 32) * 255
    vector = network(images)
    with network.returning_all_outputs():
        first, feature_map = network(images)
    assert torch.allclose(F.normalize(first), vector, atol=1e-6)
    assert feature_map.shape == (2, 96, 8)
    assert torch.equal(network(images), vector)
