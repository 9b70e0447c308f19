"""Features of all training images, from the model in training."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from fastreid.config import CfgNode
from fastreid.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

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


def extract_training_set(
    cfg: CfgNode, model: SelCon, dataset: IndexedDataset
) -> Embeddings:
    """Compute the embeddings of all training images with the test transform.

    Args:
        cfg: Complete config.
        model: Left in the mode it was in.
        dataset: The training images.

    Returns:
        Embeddings of images 0..M-1 on the model's device, the same on all ranks.
    """
    logger.info("Extracting features of %d training images", len(dataset))
    loader = build_extraction_loader(cfg, dataset)
    return extract_embeddings(model, loader, len(dataset))


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
        model.embed(torch.stack(images), student=True)
    for layer, momentum in zip(fresh, momenta, strict=True):
        layer.momentum = momentum
    model.train(was_training)
    return True
