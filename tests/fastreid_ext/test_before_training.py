"""Invalid values and test sets are refused before the training, with key and value."""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastreid.config import CfgNode
from fastreid.data.datasets import DATASET_REGISTRY
from fastreid.evaluation import DatasetEvaluator

from selcon_plugin.config.checks import flatten_config
from selcon_plugin.fastreid_ext import SelConTrainer, SyntheticPersons
from selcon_plugin.fastreid_ext.config import complete_config
from selcon_plugin.fastreid_ext.data import check_test_sets
from selcon_plugin.fastreid_ext.evaluation import evaluator_of
from selcon_plugin.fastreid_ext.host import FastReIDHost
from selcon_plugin.fastreid_ext.host_values import input_size, with_fitting_neighbors


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("TEST.METRIC", "cosin"),
        ("TEST.METRIC", "jaccard"),
        ("TEST.RERANK.K1", -1),
        ("TEST.RERANK.K1", 2.5),
        ("TEST.RERANK.K2", 0),
        ("TEST.RERANK.LAMBDA", 1.5),
        ("TEST.AQE.QE_K", 0),
        ("TEST.AQE.ALPHA", -1.0),
        ("TEST.PRECISE_BN.NUM_ITER", 0),
        ("TEST.EVAL_PERIOD", -1),
        ("TEST.EXPECTED_RESULTS", ["x"]),
        ("TEST.EXPECTED_RESULTS", [["Elsewhere", "mAP", 1.0, 1.0]]),
        ("TEST.EXPECTED_RESULTS", [["SyntheticPersons", "map", 1.0, 1.0]]),
        ("TEST.EXPECTED_RESULTS", [["SyntheticPersons", "mAP", "high", 1.0]]),
        ("TEST.EXPECTED_RESULTS", [["SyntheticPersons", "mAP", 1.0, -1.0]]),
        ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", -1.0),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "values"),
        ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", 0.0),
        ("SOLVER.WARMUP_ITERS", 10**12),
        ("SOLVER.WARMUP_METHOD", "cosine"),
        ("SOLVER.WARMUP_FACTOR", 2.0),
        ("SOLVER.MAX_EPOCH", 10**9),
        ("SOLVER.FREEZE_ITERS", -1),
        ("SOLVER.DELAY_EPOCHS", -1),
        ("SOLVER.STEPS", [55, 30]),
        ("SOLVER.STEPS", ["30"]),
        ("SOLVER.GAMMA", 0.0),
        ("SOLVER.BASE_LR", float("inf")),
        ("SOLVER.ETA_MIN_LR", float("nan")),
        ("SOLVER.BIAS_LR_FACTOR", -1.0),
        ("MODEL.SELCON.TEMPERATURE", float("inf")),
        ("MODEL.PIXEL_MEAN", [1.0, float("nan"), 1.0]),
        ("MODEL.PIXEL_STD", [1.0, 0.0, 1.0]),
        ("MODEL.FREEZE_LAYERS", [1]),
        ("MODEL.FREEZE_LAYERS", ["back("]),
        ("MODEL.LOSSES.CE.SCALE", float("inf")),
        ("DATASETS.NAMES", (1, 2)),
        ("DATASETS.NAMES", "Market1501"),
        ("DATASETS.NAMES", ("SyntheticPersons", "SyntheticPersons")),
        ("DATASETS.TESTS", None),
        ("DATASETS.TESTS", ({},)),
        ("INPUT.FLIP.PROB", 1.5),
        ("INPUT.REA.PROB", -0.1),
        ("INPUT.PADDING.SIZE", -1),
        ("INPUT.SIZE_TRAIN", [0]),
        ("INPUT.SIZE_TEST", [64, 32, 3]),
        ("INPUT.SIZE_TEST", "64"),
        ("INPUT.SIZE_TEST", 64),
    ],
)
def test_value_is_refused_with_its_key(tiny_cfg: CfgNode, key: str, value: Any) -> None:
    *nodes, name = key.split(".")
    node = tiny_cfg
    for part in nodes:
        node = node[part]
    node[name] = value
    part = value[-1] if isinstance(value, list | tuple) and value else value
    shown = part[1] if isinstance(part, list) and part[1] != "mAP" else part
    with pytest.raises(ValueError, match=re.escape(key)) as raised:
        complete_config(tiny_cfg)
    assert "\n" not in str(raised.value)
    if shown and not isinstance(shown, list | tuple):
        assert str(shown) in str(raised.value)


class Small(SyntheticPersons):
    """A test set whose images a test chooses."""

    camera: int | None = None
    num_gallery: int | None = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.camera is not None:
            self._query = [(path, pid, self.camera) for path, pid, *_ in self.query]
            self._gallery = [(path, pid, self.camera) for path, pid, *_ in self.gallery]
        if self.num_gallery is not None:
            _, pid, camid = self.query[0][:3]
            matches = [i for i in self.gallery if i[1] == pid and i[2] != camid][:1]
            others = [i for i in self.gallery if i[1] != pid]
            self._gallery = matches + others[: self.num_gallery - 1]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tiny_cfg: CfgNode) -> type[Small]:
    monkeypatch.setitem(DATASET_REGISTRY._obj_map, "Small", Small)
    monkeypatch.setattr("selcon_plugin.fastreid_ext.datasets.SyntheticPersons", Small)
    tiny_cfg.DATASETS.TESTS = ("Small",)
    return Small


def test_test_set_without_a_match_is_refused(
    small: type[Small], tiny_cfg: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small, "camera", 1)
    with pytest.raises(ValueError, match=r"Small.*none of its 8 queries.*DATASETS\.TESTS"):
        check_test_sets(complete_config(tiny_cfg))


@pytest.mark.parametrize("num_gallery", [1, 3, 7, 12])
def test_small_gallery_is_evaluated_and_its_ranks_are_right(
    small: type[Small],
    tiny_cfg: CfgNode,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    num_gallery: int,
) -> None:
    monkeypatch.setattr(small, "num_gallery", num_gallery)
    cfg = complete_config(tiny_cfg)
    check_test_sets(cfg)
    loader, _ = SelConTrainer.build_test_loader(cfg, "Small")
    num_query = len(loader.dataset) - num_gallery
    _, evaluator = evaluator_of(cfg, "Small", loader, num_query, None)
    generator = torch.Generator().manual_seed(0)
    items = loader.dataset.img_items
    features = torch.randn(len(items), 8, generator=generator)
    pids, camids = ([item[k] for item in items] for k in (1, 2))
    batch = {"targets": torch.tensor(pids), "camids": torch.tensor(camids)}
    evaluator.reset()
    evaluator.process(batch, features)
    with caplog.at_level(logging.INFO):
        found = evaluator.evaluate()
    cmc, precision, unmatched = plain_metrics(features, pids, camids, num_query)
    assert found["mAP"] == pytest.approx(100 * precision)
    left_out = f"{unmatched} of the {num_query} queries of Small have no match"
    assert (left_out in caplog.text) == (unmatched > 0)
    for rank in (1, 5, 10):
        reported = f"Rank-{rank}" in found
        assert reported == (rank <= evaluator._scope.num_images)
        if reported:
            assert found[f"Rank-{rank}"] == pytest.approx(100 * cmc[rank - 1])


def plain_metrics(
    features: torch.Tensor, pids: list[int], camids: list[int], num_query: int
) -> tuple[list[float], float, int]:
    """Compute CMC, mAP and the number of queries without a match by their definition."""
    unit = torch.nn.functional.normalize(features, dim=1)
    hits, precisions = [], []
    gallery = range(num_query, len(pids))
    for q in range(num_query):
        kept = [g for g in gallery if (pids[g], camids[g]) != (pids[q], camids[q])]
        kept.sort(key=lambda g: -float(unit[q] @ unit[g]))
        right = np.array([pids[g] == pids[q] for g in kept])
        if not right.any():
            continue
        hits.append([bool(right[: k + 1].any()) for k in range(50)])
        places = np.flatnonzero(right) + 1
        precisions.append(np.mean([(k + 1) / place for k, place in enumerate(places)]))
    return (
        np.mean(hits, axis=0).tolist(),
        float(np.mean(precisions)),
        num_query - len(hits),
    )


def test_more_neighbors_than_images_are_refused_and_defaults_lowered(
    tiny_cfg: CfgNode,
) -> None:
    tiny_cfg.TEST.RERANK.ENABLED = tiny_cfg.TEST.AQE.ENABLED = True
    fitting = with_fitting_neighbors(tiny_cfg, "few", 5)
    assert (fitting.TEST.RERANK.K1, fitting.TEST.RERANK.K2) == (4, 4)
    assert fitting.TEST.AQE.QE_K == 4
    assert tiny_cfg.TEST.RERANK.K1 == 20
    tiny_cfg.TEST.AQE.QE_K = 10**9
    with pytest.raises(ValueError, match=r"TEST\.AQE\.QE_K is 1000000000.*few has 5.*4"):
        with_fitting_neighbors(tiny_cfg, "few", 5)
    tiny_cfg.TEST.AQE.ENABLED = False
    with_fitting_neighbors(tiny_cfg, "few", 5)


class NothingToMatch(DatasetEvaluator):
    """Evaluator of a script, which needs no matches across cameras."""

    def reset(self) -> None:
        self.images = 0

    def process(self, inputs: Any, outputs: Any) -> None:
        self.images += len(outputs)

    def evaluate(self) -> dict[str, float]:
        assert self.images
        return {"mAP": 0.5}


def test_evaluator_of_a_script_decides_which_test_sets_it_evaluates(
    small: type[Small], tiny_cfg: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Trainer(SelConTrainer):
        @classmethod
        def build_evaluator(
            cls, cfg: CfgNode, dataset_name: str, output_dir: str | None = None
        ) -> Any:
            loader, _ = cls.build_test_loader(cfg, dataset_name)
            return loader, NothingToMatch()

    monkeypatch.setattr(small, "camera", 1)
    Trainer(tiny_cfg, show_progress=False)
    with pytest.raises(ValueError, match="Small"):
        SelConTrainer(tiny_cfg, show_progress=False)


def test_one_number_is_a_legal_size(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    tiny_cfg.INPUT.SIZE_TRAIN = tiny_cfg.INPUT.SIZE_TEST = [32]
    assert input_size(complete_config(tiny_cfg)) == (32, 32)
    cropped = copy.deepcopy(tiny_cfg)
    cropped.INPUT.CROP.ENABLED = True
    cropped.INPUT.CROP.SIZE = [24]
    assert input_size(complete_config(cropped)) == (24, 24)
    cropped.INPUT.PADDING.ENABLED = False
    trainer = SelConTrainer(cropped, show_progress=False)
    trainer.resume_or_load(False)
    assert trainer.train()["mAP"] > 0
    cropped.INPUT.CROP.SIZE = [0]
    with pytest.raises(ValueError, match=r"INPUT\.CROP\.SIZE.*0"):
        complete_config(cropped)


@pytest.mark.parametrize("size", [[0], [0, 0]])
def test_images_in_their_own_size_need_a_crop(tiny_cfg: CfgNode, size: list[int]) -> None:
    inputs = tiny_cfg.INPUT
    inputs.SIZE_TRAIN, inputs.SIZE_TEST = size, size
    inputs.CROP.SIZE = [48, 24]
    with pytest.raises(ValueError, match=r"SIZE_TRAIN \[0.*CROP\.ENABLED to True"):
        complete_config(tiny_cfg)
    inputs.CROP.ENABLED = True
    with pytest.raises(ValueError, match=r"SIZE_TRAIN \[0.*PADDING\.ENABLED to False"):
        complete_config(tiny_cfg)
    inputs.PADDING.ENABLED = False
    assert input_size(complete_config(tiny_cfg)) == (48, 24)
    described = FastReIDHost().describe_network(flatten_config(tiny_cfg))
    assert described[1] == "48x24"
    trainer = SelConTrainer(tiny_cfg, show_progress=False)
    trainer.resume_or_load(False)
    assert trainer.train()["mAP"] > 0
    inputs.CROP.ENABLED, inputs.SIZE_TRAIN = False, [64, 32]
    with pytest.raises(ValueError, match=r"SIZE_TEST \[0"):
        complete_config(tiny_cfg)
