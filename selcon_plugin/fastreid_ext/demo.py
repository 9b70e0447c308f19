"""The steps of ``selcon demo`` in FastReID."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from fastreid.config import CfgNode
from fastreid.evaluation import inference_on_dataset
from fastreid.modeling import build_model
from fastreid.utils.compute_dist import build_dist
from torch import nn

from selcon_plugin.config.demo import Demo, Ranking
from selcon_plugin.datasets import SyntheticPersonsSpec
from selcon_plugin.fastreid_ext.datasets import dataset_root, synthetic_persons_spec
from selcon_plugin.fastreid_ext.results import write_results
from selcon_plugin.fastreid_ext.trainer import SelConTrainer
from selcon_plugin.runs.ranked import LabeledImages


class FastReIDDemo(Demo):
    """Demo that renders, trains and evaluates with one FastReID config.

    Args:
        cfg: Complete config.
    """

    run_files = (
        *("model_*.pth", "model_*.pth.partial", "last_checkpoint*", "config.yaml"),
        *("metrics.json", "log.txt", "events.out.tfevents.*"),
    )
    free_keys = ("OUTPUT_DIR", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS", "TEST.")
    metrics_file = "metrics.json"

    def __init__(self, cfg: CfgNode) -> None:
        self._cfg = cfg
        self._log = Path(cfg.OUTPUT_DIR) / "log.txt"

    @property
    def test_set(self) -> str:
        """Name of the only test set."""
        tests = self._cfg.DATASETS.TESTS
        if len(tests) != 1:
            raise ValueError(
                f"the demo needs exactly one test set, but DATASETS.TESTS is {tests}"
            )
        name: str = tests[0]
        return name

    @property
    def data(self) -> tuple[Path, SyntheticPersonsSpec] | None:
        """Folder of the data sets and specification of the persons; None for other data."""
        named = (*self._cfg.DATASETS.NAMES, *self._cfg.DATASETS.TESTS)
        if "SyntheticPersons" not in named:
            return None
        return Path(dataset_root()).resolve(), synthetic_persons_spec(self._cfg)

    @property
    def data_name(self) -> str:
        """Name of the data, which contains the version of the renderer."""
        return synthetic_persons_spec(self._cfg).folder_name

    @cached_property
    def _trainer(self) -> SelConTrainer:
        cfg = self._cfg.clone()
        cfg.defrost()
        cfg.DATASETS.TESTS = ()  # the demo evaluates afterwards
        trainer = SelConTrainer(cfg)
        trainer.resume_or_load(resume=True)
        return trainer

    @property
    def epochs_trained(self) -> int:
        """Number of finished epochs of the run."""
        epochs: int = min(self._trainer.start_epoch, self._trainer.max_epoch)
        return epochs

    def train(self) -> None:
        """Train without labels, or finish a run; keep only ``model_final.pth``."""
        trainer = self._trainer
        if trainer.start_epoch < trainer.max_epoch:
            with trainer.meter.running():
                trainer.train()
        for file in Path(self._cfg.OUTPUT_DIR).glob("model_[0-9]*.pth"):
            file.unlink()  # model_final.pth contains all of their state

    def rank_untrained(self) -> Ranking:
        """Evaluate FastReID's own model with the same backbone, without any training."""
        cfg = self._cfg.clone()
        cfg.defrost()
        cfg.MODEL.META_ARCHITECTURE = "Baseline"
        cfg.MODEL.HEADS.NAME = "EmbeddingHead"
        cfg.MODEL.HEADS.EMBEDDING_DIM = 0  # no projection
        cfg.MODEL.HEADS.WITH_BNNECK = False
        cfg.MODEL.HEADS.NUM_CLASSES = 1  # size of the classifier, unused in evaluation
        # Its ranked results are not of the run, which begins later in its own folder.
        with tempfile.TemporaryDirectory() as folder:
            cfg.OUTPUT_DIR = folder
            return self._rank(build_model(cfg), cfg)

    def rank_trained(self) -> Ranking:
        """Evaluate the trained model."""
        return self._rank(self._trainer.model, self._cfg)

    @property
    def schedule(self) -> tuple[int, int]:
        """Number of steps per epoch, and number of warm-up steps."""
        steps: int = self._trainer.iters_per_epoch
        return steps, self._cfg.MODEL.SELCON.WARMUP_EPOCHS * steps

    def write_results(self, metrics: dict[str, float]) -> None:
        """Write ``results.json`` with the metrics of the trained model."""
        write_results(self._trainer, {self.test_set: metrics})

    def _rank(self, model: nn.Module, cfg: CfgNode) -> Ranking:
        """Evaluate a model with FastReID's evaluator, and return the distances as well."""
        with _redirect_output(self._log):  # the first evaluator compiles its ranking
            loader, evaluator = SelConTrainer.build_evaluator(cfg, self.test_set)
        metrics = inference_on_dataset(
            model, loader, evaluator, flip_test=cfg.TEST.FLIP.ENABLED
        )
        features = torch.cat([batch["feats"] for batch in evaluator._predictions])
        num_query: int = evaluator._num_query
        items = loader.dataset.img_items
        return Ranking(
            {name: float(value) for name, value in metrics.items()},
            build_dist(features[:num_query], features[num_query:], cfg.TEST.METRIC),
            _labeled(items[:num_query]),
            _labeled(items[num_query:]),
        )


def _labeled(items: Sequence[tuple[str, int, int]]) -> LabeledImages:
    paths, pids, camids = zip(*items, strict=True)
    return LabeledImages(paths, np.array(pids), np.array(camids))


@contextlib.contextmanager
def _redirect_output(file: Path) -> Iterator[None]:
    """Redirect the output of this process and its children (compilers) to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    try:
        with file.open("ab") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in enumerate(saved, start=1):
            os.dup2(copy, number)
            os.close(copy)
