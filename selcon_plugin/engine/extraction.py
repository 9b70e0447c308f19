"""Feature extraction for all training images, and calibration of new batch-norm layers."""

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

# Number of batches that calibrate new normalization layers before the first extraction.
_CALIBRATION_BATCHES = 16


@torch.no_grad()
def extract_embeddings(
    network: EmbeddingNetwork,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_images: int,
) -> Embeddings:
    """Compute the embeddings of all images in evaluation mode.

    Under distributed training each rank computes its shard, which may be empty, and every
    rank returns the embeddings of all images.

    Args:
        network: Network; its training mode is restored afterwards.
        batches: Images and their indices for this rank, every image once.
        num_images: Number of images M.

    Returns:
        Float32 embeddings of images 0..M-1 on the network's device.
    """
    was_training = network.training
    network.eval()
    # The sizes come from the head, not from the first batch: a rank may have no images.
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
    if world_size() > 1:  # every row is zero except on the rank that computed it
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
    """Set the running statistics of the head's new batch-norm layers from training images.

    A new BatchNorm normalizes by mean 0 and variance 1 in evaluation mode; pooled features
    then all point in the same direction, and the first banks rank poorly. Layers that have
    already seen data (loaded weights) are not changed.

    Args:
        network: Network in any mode; the running statistics of its head change.
        dataset: Training images with the test transform.
        batch_size: Images per batch.

    Returns:
        Whether any layer was calibrated.
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
        layer.momentum = None  # cumulative average: every batch has the same weight
    # Every rank uses the same random images, so that all ranks get the same statistics.
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
