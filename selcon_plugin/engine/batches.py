"""Choice of the batch sampler, and division of a batch into micro-batches."""

from __future__ import annotations

import logging
from typing import Any

from selcon_plugin.samplers.cluster import AUTO, STREAM_SAMPLER, ClusterSampler
from selcon_plugin.samplers.stream import BatchStream, StreamSampler

logger = logging.getLogger(__name__)


def build_sampler(
    name: str,
    num_images: int,
    *,
    batch_size: int,
    num_instances: int = 4,
    outlier_ratio: float = 0.0,
    micro_batches: int = 1,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> BatchStream:
    """Build the sampler of a run.

    Args:
        name: ``"stream"`` or the name of a planner.
        num_images: Training images M.
        batch_size: Images in a batch, over all processes.
        num_instances: Images of each cluster in a batch.
        outlier_ratio: Fraction of each batch that is sampled from outliers.
        micro_batches: Parts into which a process splits its shard of a batch.
        seed: Seed of the random sampling.
        rank: Rank of this process.
        world_size: Number of processes.

    Returns:
        The sampler.

    Raises:
        ValueError: If there are fewer images than a batch holds, or the batch cannot be
            split evenly.
    """
    if num_images < batch_size:
        unit = num_instances * micro_batches * world_size
        # Two clusters, or half of the images: not every cluster is found.
        fitting = max(2 * unit, num_images // (2 * unit) * unit)
        hint = f"; {fitting} fits" if fitting <= num_images else ""
        raise ValueError(
            f"{num_images} training images do not fill one batch: lower the batch size "
            f"({batch_size}) or add images{hint}"
        )
    check_batch_size(
        name,
        batch_size,
        num_instances=num_instances,
        micro_batches=micro_batches,
        world_size=world_size,
    )
    common = {
        "batch_size": batch_size,
        "seed": seed,
        "rank": rank,
        "world_size": world_size,
    }
    if name == STREAM_SAMPLER:
        return StreamSampler(num_images, **common)
    return ClusterSampler(
        planner=name, num_instances=num_instances, outlier_ratio=outlier_ratio, **common
    )


def fitting_batch_size(
    batch_size: int,
    default: int,
    num_images: int,
    *,
    sampler: str,
    num_instances: int,
    micro_batches: int = 1,
    world_size: int = 1,
    key: str,
) -> int:
    """Lower the default batch size to what the training images fill.

    Args:
        batch_size: Images in a batch, over all processes.
        default: The host's default, which nobody has chosen; another value stays.
        num_images: Training images M.
        sampler: ``"stream"`` or the name of a planner.
        num_instances: Images of each cluster in a batch.
        micro_batches: Number of micro-batches.
        world_size: Number of processes.
        key: The host's name of the batch size, for the log.

    Returns:
        The batch size.
    """
    if batch_size != default or batch_size <= num_images:
        return batch_size
    pieces = world_size * micro_batches
    if sampler != STREAM_SAMPLER:
        pieces *= num_instances
    fitting = num_images // pieces * pieces
    if not fitting:
        return batch_size
    logger.info(
        "%s is %d instead of the default %d: there are %d training images",
        key,
        fitting,
        default,
        num_images,
    )
    return fitting


def check_sampler(name: str, method: str, *, needs_clusters: bool, key: str) -> None:
    """Refuse a cluster sampler for a method that does not cluster.

    Args:
        name: ``"stream"`` or the name of a planner.
        method: Registered name.
        needs_clusters: Whether the method clusters, with its options.
        key: The host's name of the setting, for the error message.

    Raises:
        ValueError: If the sampler would have no clusters to sample from.
    """
    if not needs_clusters and name != STREAM_SAMPLER:
        raise ValueError(
            f"{key} {name} samples from clusters, but {method} does not cluster with "
            f"these options: set it to {AUTO!r}"
        )


def check_batch_size(
    name: str,
    batch_size: int,
    *,
    num_instances: int,
    micro_batches: int,
    world_size: int,
) -> None:
    """Refuse a batch size that cannot be split evenly.

    Args:
        name: ``"stream"`` or the name of a planner.
        batch_size: Images in a batch, over all processes.
        num_instances: Images of each cluster in a batch.
        micro_batches: Parts into which a process splits its shard of a batch.
        world_size: Number of processes.

    Raises:
        ValueError: If the parts would differ in size, or would separate the images of a
            cluster.
    """
    pieces = world_size * micro_batches
    if batch_size % pieces:
        raise ValueError(
            f"the batch size ({batch_size}, over all processes) must be a multiple of "
            f"micro-batches ({micro_batches}) x processes ({world_size})"
        )
    if name != STREAM_SAMPLER and batch_size % (pieces * num_instances):
        raise ValueError(
            f"the batch size ({batch_size}) must be a multiple of images per cluster "
            f"({num_instances}) x micro-batches ({micro_batches}) x processes "
            f"({world_size})"
        )


def split_batch(batch: dict[str, Any], num_micro_batches: int) -> list[dict[str, Any]]:
    """Split a batch into contiguous parts of equal size.

    The parts are contiguous, so that the blocks of K images of one cluster stay whole
    wherever K divides the size of a part.

    Args:
        batch: Tensors and lists by name, each with one entry per image.
        num_micro_batches: Number of parts.

    Returns:
        The parts in order; their tensors are views.

    Raises:
        ValueError: If the number of images is not a multiple of the number of parts, or the
            entries differ in length.
    """
    if num_micro_batches == 1:
        return [batch]
    lengths = {name: len(values) for name, values in batch.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(
            f"every value of a batch needs one entry per image, got lengths {lengths}"
        )
    batch_size = next(iter(lengths.values()))
    if batch_size % num_micro_batches:
        raise ValueError(
            f"a batch of {batch_size} images cannot be split into {num_micro_batches} "
            "micro-batches of equal size: choose a number of micro-batches that divides "
            "the number of images per process"
        )
    size = batch_size // num_micro_batches
    return [
        {name: values[start : start + size] for name, values in batch.items()}
        for start in range(0, batch_size, size)
    ]
