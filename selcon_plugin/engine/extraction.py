"""Features of all training images, and fresh normalization layers made ready for them."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from selcon_plugin.distributed import world_size
from selcon_plugin.engine.images import IndexedImages
from selcon_plugin.engine.network import EmbeddingNetwork
from selcon_plugin.engine.progress import with_progress
from selcon_plugin.features import Embeddings
from selcon_plugin.samplers.stream import StreamSampler

logger = logging.getLogger(__name__)

# Batches shown to fresh normalization layers before the first features are taken.
_CALIBRATION_BATCHES = 16


@torch.no_grad()
def extract_embeddings(
    network: EmbeddingNetwork,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_images: int,
) -> Embeddings:
    """Compute the embeddings of all images, in evaluation mode.

    Under distributed training each rank computes its share, which may be empty, and all get
    the whole.

    Args:
        network: Left in the mode it was in.
        batches: Images and their indices, every image once; of this rank.
        num_images: Images M.

    Returns:
        Float32 embeddings of images 0..M-1 on the network's device.
    """
    was_training = network.training
    network.eval()
    # Sized by the head and not by the first batch: a rank may have no image.
    heads, device = network.heads, network.device
    globals_ = torch.zeros(num_images, heads.global_dim, device=device)
    parts: Tensor | None = None
    if heads.num_parts:
        size = (num_images, heads.num_parts, heads.part_dim)
        parts = torch.zeros(size, device=device)
    for images, index in with_progress(batches, f"Features of {num_images} images"):
        rows = index.to(device)
        global_features, part_features = network.embed(images)
        globals_[rows] = global_features.float()
        if parts is not None and part_features is not None:
            parts[rows] = part_features.float()
    network.train(was_training)
    if world_size() > 1:  # every row is zero but on the rank that computed it
        dist.all_reduce(globals_)
        if parts is not None:
            dist.all_reduce(parts)
    return Embeddings(globals_, parts)


@torch.no_grad()
def calibrate_normalization(
    network: EmbeddingNetwork,
    dataset: IndexedImages,
    batch_size: int,
) -> bool:
    """Give the head's fresh batch-norm layers the statistics of the training images.

    A new BatchNorm normalizes by mean 0 and variance 1 in evaluation mode; pooled features
    then all point the same way and the first banks rank badly. Layers that have seen data
    (loaded weights) are left alone.

    Args:
        network: In any mode; its head's statistics change.
        dataset: Training images with the test transform.
        batch_size: Images per batch.

    Returns:
        Whether there was anything to calibrate.
    """
    fresh = [
        module
        for module in network.heads.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.num_batches_tracked is not None
        and int(module.num_batches_tracked) == 0
    ]
    if not fresh:
        return False
    was_training = network.training
    network.eval()
    momenta = [layer.momentum for layer in fresh]
    for layer in fresh:
        layer.train()
        layer.momentum = None  # the average over all batches, each with the same weight
    # The same random images on every rank: all ranks get the same statistics.
    stream = iter(StreamSampler(len(dataset), seed=dataset.seed))
    batch_size = min(batch_size, len(dataset))
    for _ in range(min(_CALIBRATION_BATCHES, len(dataset) // batch_size)):
        samples = [dataset[next(stream)] for _ in range(batch_size)]
        images = torch.stack([dataset.image_of(sample) for sample in samples])
        network.embed(images, student=True)
    for layer, momentum in zip(fresh, momenta, strict=True):
        layer.momentum = momentum
    network.train(was_training)
    return True
