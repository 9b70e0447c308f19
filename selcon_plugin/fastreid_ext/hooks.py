"""Hooks: when the method is prepared, told, written and watched in the training loop."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from fastreid.engine.hooks import PeriodicCheckpointer
from fastreid.engine.train_loop import HookBase
from fastreid.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from selcon_plugin.diagnostics import neighbor_precision
from selcon_plugin.fastreid_ext.data import IndexedDataset, build_extraction_loader
from selcon_plugin.fastreid_ext.meta_arch import SelCon
from selcon_plugin.features import Embeddings
from selcon_plugin.samplers import StreamSampler

logger = logging.getLogger(__name__)

# Batches shown to fresh normalisation layers before the first features are taken.
_CALIBRATION_BATCHES = 16


def unwrap(model: nn.Module) -> SelCon:
    """Return the SelCon model inside DistributedDataParallel.

    Args:
        model: The trainer's model.

    Returns:
        The model itself.

    Raises:
        TypeError: If it is another meta-architecture.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    if not isinstance(inner, SelCon):
        raise TypeError(
            "SelConTrainer trains the meta-architecture SelCon: set "
            f"MODEL.META_ARCHITECTURE to SelCon, not {type(inner).__name__}"
        )
    return inner


@torch.no_grad()
def extract_embeddings(model: SelCon, loader: Any, num_images: int) -> Embeddings:
    """Compute the embeddings of all images, in evaluation mode.

    Under distributed training each rank computes its share and all get the whole.

    Args:
        model: Left in the mode it was in.
        loader: Batches whose ``targets`` are image indices; every image once.
        num_images: Images M.

    Returns:
        Embeddings of images 0..M-1 on the model's device.
    """
    was_training = model.training
    model.eval()
    globals_: Tensor | None = None
    parts: Tensor | None = None
    for batch in _with_progress(loader, "extracting features"):
        index = batch["targets"].to(model.device)
        global_features, part_features = model.embed(batch)
        if globals_ is None:
            globals_ = global_features.new_zeros(num_images, *global_features.shape[1:])
            if part_features is not None:
                parts = part_features.new_zeros(num_images, *part_features.shape[1:])
        globals_[index] = global_features
        if parts is not None and part_features is not None:
            parts[index] = part_features
    model.train(was_training)
    assert globals_ is not None
    if comm.get_world_size() > 1:  # every row is zero but on the rank that computed it
        dist.all_reduce(globals_)
        if parts is not None:
            dist.all_reduce(parts)
    return Embeddings(globals_, parts)


def _with_progress(loader: Any, what: str) -> Iterable[Any]:
    hidden = not comm.is_main_process() or not sys.stderr.isatty()
    bar: Iterable[Any] = tqdm(loader, desc=what, unit="batch", leave=False, disable=hidden)
    return bar


@torch.no_grad()
def calibrate_normalization(
    model: SelCon, dataset: IndexedDataset, batch_size: int
) -> bool:
    """Give the head's fresh batch-norm layers the statistics of the training images.

    A new BatchNorm normalises by mean 0 and variance 1 in evaluation mode; pooled features
    then all point the same way and the first banks rank badly. Layers that have seen data
    (loaded weights) are left alone.

    Args:
        model: Model in any mode; its head's statistics change.
        dataset: Training images with the test transform.
        batch_size: Images per batch.

    Returns:
        Whether there was anything to calibrate.
    """
    fresh = [
        module
        for module in model.heads.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.num_batches_tracked is not None
        and int(module.num_batches_tracked) == 0
    ]
    if not fresh:
        return False
    was_training = model.training
    model.eval()
    momenta = [layer.momentum for layer in fresh]
    for layer in fresh:
        layer.train()
        layer.momentum = None  # the average over all batches, each with the same weight
    # The same random images on every rank: all ranks get the same statistics.
    stream = iter(StreamSampler(len(dataset), seed=dataset.seed))
    batch_size = min(batch_size, len(dataset))
    for _ in range(min(_CALIBRATION_BATCHES, len(dataset) // batch_size)):
        images = [dataset[next(stream).index]["images"] for _ in range(batch_size)]
        model.embed(torch.stack(images))
    for layer, momentum in zip(fresh, momenta, strict=True):
        layer.momentum = momentum
    model.train(was_training)
    return True


class MethodHook(HookBase):
    """Run the method along the training loop.

    * before training: fill the banks, unless a checkpoint brought them;
    * before each epoch: tell the method, and seed all random streams by ``(seed, epoch,
      rank)``, so that a run resumed at an epoch goes on as the unbroken one would;
    * after each step: write the batch into the banks.

    Args:
        cfg: Complete config.
        dataset: The training images.
    """

    def __init__(self, cfg: Any, dataset: IndexedDataset) -> None:
        self._cfg = cfg
        self._dataset = dataset

    def before_train(self) -> None:
        """Fill the banks from the features of all training images."""
        model = unwrap(self.trainer.model)
        assert model.method is not None
        if model.method.prepared:
            return
        logger.info("Extracting features of %d training images", len(self._dataset))
        loader = build_extraction_loader(self._cfg, self._dataset)
        calibrate_normalization(model, loader.dataset, self._cfg.TEST.IMS_PER_BATCH)
        embeddings = extract_embeddings(model, loader, len(self._dataset))
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
        """Write the banks."""
        unwrap(self.trainer.model).update_banks()


def seed_all(seed: int) -> None:
    """Seed the random streams of Python, NumPy and PyTorch (CPU and GPU)."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (FastReID and its transforms use the global stream)
    torch.manual_seed(seed)


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
        true_pids = torch.tensor(dataset.true_pids)
        # One identity per image or a single one says nothing about neighbours.
        num_pids = len(set(dataset.true_pids))
        self._true_pids = true_pids if 1 < num_pids < len(true_pids) else None

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
