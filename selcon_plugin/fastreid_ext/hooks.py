"""Hooks: when the method is prepared, told, written and watched in the training loop."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastreid.engine.hooks import PeriodicCheckpointer
from fastreid.engine.train_loop import HookBase
from fastreid.utils import comm
from torch import Tensor
from tqdm import tqdm

from selcon_plugin.diagnostics import neighbor_precision
from selcon_plugin.fastreid_ext.data import IndexedDataset, build_extraction_loader
from selcon_plugin.fastreid_ext.embedding import (
    calibrate_normalization,
    extract_training_set,
    unwrap,
)


class MethodHook(HookBase):
    """Run the method along the training loop.

    * before training: make fresh normalisation and teacher ready, and fill the banks of a
      method without clusters, unless a checkpoint brought them;
    * before each epoch: tell the method, and seed all random streams by ``(seed, epoch,
      rank)``, so that a run resumed at an epoch goes on as the unbroken one would;
    * after each step: write the batch into the banks, let the teacher follow.

    Args:
        cfg: Complete config.
        dataset: The training images.
    """

    def __init__(self, cfg: Any, dataset: IndexedDataset) -> None:
        self._cfg = cfg
        self._dataset = dataset

    def before_train(self) -> None:
        """Prepare what a checkpoint did not bring."""
        model = unwrap(self.trainer.model)
        assert model.method is not None
        if model.method.prepared:
            return
        test_view = build_extraction_loader(self._cfg, self._dataset).dataset
        calibrate_normalization(model, test_view, self._cfg.TEST.IMS_PER_BATCH)
        model.update_teacher(restart=True)
        if not model.method.needs_clusters:
            embeddings = extract_training_set(self._cfg, model, self._dataset)
            camids = torch.tensor(self._dataset.camids, device=model.device)
            model.method.prepare(embeddings, camids)

    def before_epoch(self) -> None:
        """Begin an epoch."""
        epoch = self.trainer.epoch
        model = unwrap(self.trainer.model)
        assert model.method is not None
        model.method.start_epoch(epoch)
        seed = np.random.SeedSequence((self._cfg.MODEL.SELCON.SEED, epoch, comm.get_rank()))
        seed_all(int(seed.generate_state(1)[0]))

    def after_step(self) -> None:
        """Write the banks and move the teacher."""
        model = unwrap(self.trainer.model)
        model.update_banks()
        model.update_teacher()


def seed_all(seed: int) -> None:
    """Seed the random streams of Python, NumPy and PyTorch (CPU and GPU)."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (FastReID and its transforms use the global stream)
    torch.manual_seed(seed)


def known_pids(dataset: IndexedDataset) -> Tensor | None:
    """Return the identities for diagnostics, or None where they say nothing.

    Args:
        dataset: The training images.

    Returns:
        Identity of each image, int64 ``(M,)``; None if all images have one, or each its
        own.
    """
    num_pids = len(set(dataset.true_pids))
    if not 1 < num_pids < len(dataset):
        return None
    return torch.tensor(dataset.true_pids)


class DiagnosticsHook(HookBase):
    """Write what a user watches to FastReID's log, JSON and TensorBoard writers.

    The only place in training where identities appear, and only if the data set has them:
    the share of true matches among the chosen neighbours. Nothing flows back.

    Args:
        dataset: The training images.
        period: Steps between reports; 0 for none.
    """

    def __init__(self, dataset: IndexedDataset, period: int) -> None:
        self._period = period
        self._true_pids = known_pids(dataset)

    def after_step(self) -> None:
        """Report every ``period`` steps."""
        if not self._period or (self.trainer.iter + 1) % self._period:
            return
        method = unwrap(self.trainer.model).method
        assert method is not None
        report = method.diagnostics()
        selected = method.selected_positives()
        if selected is not None and self._true_pids is not None:
            anchors, neighbors = selected
            report["neighbor_precision"] = neighbor_precision(
                anchors.cpu(), neighbors.cpu(), self._true_pids
            )
        if report:
            # As measured: the writers' median over 20 reports would lag by epochs.
            self.trainer.storage.put_scalars(smoothing_hint=False, **report)


class ProgressHook(HookBase):
    """Progress bar over all steps, with loss and time left, on the main process."""

    def before_train(self) -> None:
        """Open the bar."""
        self._bar = tqdm(
            total=self.trainer.max_iter,
            initial=self.trainer.start_iter,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            mininterval=1.0 if sys.stderr.isatty() else 15.0,
            disable=not comm.is_main_process(),
        )

    def after_step(self) -> None:
        """Move the bar."""
        latest = self.trainer.storage.latest()
        if "total_loss" in latest:
            # The epoch shown counts from 1, as people do.
            self._bar.set_postfix(
                epoch=f"{self.trainer.epoch + 1}/{self.trainer.max_epoch}",
                loss=f"{latest['total_loss'][0]:.3f}",
                refresh=False,
            )
        self._bar.update()

    def after_train(self) -> None:
        """Close the bar."""
        self._bar.close()


class CheckpointHook(PeriodicCheckpointer):
    """FastReID's periodic checkpointer, for runs without a test set as well.

    Args:
        checkpointer: Writes the files.
        period: Epochs between checkpoints.
        keep: How many periodic checkpoints stay, the newest; 0 for all.
    """

    def __init__(self, checkpointer: Any, period: int, keep: int = 0) -> None:
        super().__init__(checkpointer, period)
        self._keep = keep

    def before_train(self) -> None:
        """Note the last epoch, and the metric that decides which model is the best."""
        if self.trainer.cfg.DATASETS.TESTS:
            super().before_train()
            return
        # FastReID takes the name of the first test set, of which there is none.
        self.max_epoch = self.trainer.max_epoch
        self.metric_name = "metric"

    def after_epoch(self) -> None:
        """Save every ``period`` epochs; then remove what is too old."""
        super().after_epoch()
        if self._keep:
            folder = Path(self.checkpointer.save_dir)
            for file in sorted(folder.glob("model_[0-9]*.pth"))[: -self._keep]:
                file.unlink()
