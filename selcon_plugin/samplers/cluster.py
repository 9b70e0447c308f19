"""Sampler that composes batches from pseudo-labels by a planner."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from selcon_plugin.samplers.planners import Planner, PlanSettings, planner_named
from selcon_plugin.samplers.stream import (
    BatchStream,
    Indices,
    shuffled_passes,
    whole_numbers,
)

# Values of the option "sampler" in addition to the names of the planners.
AUTO, STREAM_SAMPLER = "auto", "stream"
# Planners that sample K images of each of P clusters.
_CLUSTERS_TIMES_INSTANCES = ("pk", "pk_camera", "proxy")


def clusters_per_batch(sampler: str, batch_size: int, num_instances: int) -> int:
    """Return the minimum number of clusters that a batch needs.

    Args:
        sampler: Name of the sampler, not "auto".
        batch_size: Images in a batch.
        num_instances: Images of each cluster in a batch.

    Returns:
        P for samplers of P x K images, otherwise 2.
    """
    return batch_size // num_instances if sampler in _CLUSTERS_TIMES_INSTANCES else 2


@dataclass(frozen=True)
class _Epoch:
    """Immutable inputs from which the batches of an epoch are composed."""

    labels: Indices  # of the images that the planner samples from
    camids: Indices | None
    images: Indices  # indices of those images
    outliers: Indices  # sampled by the quota, if any
    start_batch: int
    planner: Planner


class ClusterSampler(BatchStream):
    """Sampler of batches from pseudo-labels, which :meth:`set_labels` updates each epoch.

    An epoch consists of passes, each planned by the planner with randomness seeded by
    ``(seed, start_batch, pass)``: a resumed run that sets the same labels samples the same
    batches.

    With ``outlier_ratio``, each batch contains that fraction of outliers, sampled in
    shuffled passes; if there are few, an outlier occurs several times in a batch. Outliers
    form blocks of ``num_instances``, spread evenly over the batch, so that ranks and groups
    of batch normalization get similar fractions. The planner fills the rest from the
    clustered images. In an epoch without outliers, or without clusters, the planner fills
    the whole batch.

    Args:
        batch_size: Images B in a batch, over all processes; a multiple of
            ``num_instances``.
        planner: Registered name; see :func:`planner_names`.
        num_instances: Images K of each cluster in a batch.
        group_size: Largest number of images of a cluster that the planner ``group`` keeps
            together.
        outlier_ratio: Fraction of outliers in each batch, in [0, 1); rounded to blocks of
            ``num_instances``, at least one block and at most all but one.
        seed: Random seed, equal on all ranks.
        rank: Rank of this process.
        world_size: Number of processes.

    Attributes:
        start: Number of the batch at which the next iteration starts; :meth:`set_labels`
            sets it, and a later value resumes inside an epoch.
        outliers_per_batch: Number of outliers in a batch by ``outlier_ratio``.

    Raises:
        ValueError: If a setting is out of range, or the batch is not a multiple of
            ``num_instances`` and of the number of processes.

    Example:
        >>> sampler = ClusterSampler(batch_size=4, planner="pk", num_instances=2)
        >>> sampler.set_labels([0, 0, -1, 1, 1], camids=None, start_batch=0)
        >>> sorted(next(sampler.batches(0)).tolist())
        [0, 1, 3, 4]
    """

    def __init__(
        self,
        *,
        batch_size: int,
        planner: str = "pk_camera",
        num_instances: int = 4,
        group_size: int = 256,
        outlier_ratio: float = 0.0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
        for name, value in (("num_instances", num_instances), ("group_size", group_size)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if batch_size % num_instances:
            raise ValueError(
                f"batch_size ({batch_size}) must be a multiple of num_instances "
                f"({num_instances})"
            )
        self.planner = planner_named(planner)
        self.num_instances = num_instances
        self.group_size = group_size
        self.outliers_per_batch = _quota(outlier_ratio, batch_size, num_instances)
        self._block_order = _spread(
            batch_size // num_instances, self.outliers_per_batch // num_instances
        )
        self._epoch: _Epoch | None = None

    def set_labels(
        self,
        labels: Tensor | ArrayLike,
        camids: Tensor | ArrayLike | None,
        start_batch: int,
        *,
        planner: str | None = None,
    ) -> None:
        """Start an epoch with new labels.

        Iterators that have already started keep their labels.

        Args:
            labels: Cluster of each image, integers of shape ``(M,)``; negative for an
                outlier. Copied.
            camids: Camera of each image, shape ``(M,)``, -1 where unknown, or None. Copied.
            start_batch: Number of the epoch's first batch, counted over the whole run.
            planner: Registered name of a planner for this epoch only, for instance
                ``"shuffle"`` if there are no clusters to learn from.

        Raises:
            ValueError: If the labels or cameras are not integers of shape ``(M,)``, or the
                planner finds no image to sample.
        """
        labels = whole_numbers("labels", labels)
        if camids is not None:
            camids = whole_numbers("camids", camids)
            if len(camids) != len(labels):
                raise ValueError(
                    f"camids ({len(camids)}) and labels ({len(labels)}) must have the same "
                    "length"
                )
        if not len(labels):
            raise ValueError("there are no images to sample from")
        clustered, outliers = np.flatnonzero(labels >= 0), np.flatnonzero(labels < 0)
        images = np.arange(len(labels))
        if self.outliers_per_batch and len(clustered) and len(outliers):
            images = clustered  # outliers are sampled by quota
        else:
            outliers = outliers[:0]
        epoch = _Epoch(
            labels[images],
            None if camids is None else camids[images],
            images,
            outliers,
            start_batch,
            self.planner if planner is None else planner_named(planner),
        )
        next(self._batches_of(epoch))  # fail here instead of in a data loader
        self._epoch = epoch
        self.start = start_batch

    def batches(self, start: int) -> Iterator[Indices]:
        """Sample the global batches ``start``, ``start + 1``, ...; see the base class.

        Args:
            start: Number of the first batch, within the epoch of the current labels.

        Returns:
            An iterator over the batches.

        Raises:
            RuntimeError: If no labels have been set.
            ValueError: If the batch precedes the epoch.
        """
        epoch = self._epoch
        if epoch is None:
            raise RuntimeError("call set_labels() before sampling the first batch")
        if start < epoch.start_batch:
            raise ValueError(
                f"batch {start} precedes batch {epoch.start_batch}, at which the labels "
                "were set: call set_labels() with the labels of its epoch"
            )
        return itertools.islice(self._batches_of(epoch), start - epoch.start_batch, None)

    def _batches_of(self, epoch: _Epoch) -> Iterator[Indices]:
        if len(epoch.outliers):
            return self._with_outliers(epoch)
        return self._planned(epoch, self.batch_size)

    def _with_outliers(self, epoch: _Epoch) -> Iterator[Indices]:
        num_outliers = self.outliers_per_batch
        sampled = shuffled_passes(
            len(epoch.outliers),
            num_outliers,
            0,
            # The 1 makes this random stream differ from the planner's.
            lambda number: np.random.default_rng((self.seed, epoch.start_batch, number, 1)),
        )
        for planned in self._planned(epoch, self.batch_size - num_outliers):
            both = np.concatenate([planned, epoch.outliers[next(sampled)]])
            yield both.reshape(-1, self.num_instances)[self._block_order].reshape(-1)

    def _planned(self, epoch: _Epoch, batch_size: int) -> Iterator[Indices]:
        settings = PlanSettings(batch_size, self.num_instances, self.group_size)
        for number in itertools.count():
            rng = np.random.default_rng((self.seed, epoch.start_batch, number))
            plan = epoch.planner(epoch.labels, epoch.camids, settings, rng)
            if not len(plan):
                raise ValueError("the planner returned a pass without batches")
            yield from epoch.images[plan]


def _quota(outlier_ratio: float, batch_size: int, num_instances: int) -> int:
    """Return the number of outliers in a batch: whole blocks, at least one, not all."""
    if not 0 <= outlier_ratio < 1:
        raise ValueError(f"outlier_ratio must lie in [0, 1), got {outlier_ratio}")
    if outlier_ratio == 0:
        return 0
    num_blocks = batch_size // num_instances
    if num_blocks < 2:
        raise ValueError(
            f"outlier_ratio ({outlier_ratio}) needs a batch_size of 2 * num_instances "
            f"({2 * num_instances}) or more, got {batch_size}"
        )
    blocks = round(outlier_ratio * num_blocks)
    return min(max(blocks, 1), num_blocks - 1) * num_instances


def _spread(num_blocks: int, num_last: int) -> Indices:
    """Return an order of blocks that spreads the last ones evenly among the others."""
    bounds = np.arange(num_blocks + 1) * num_last // num_blocks
    is_last = np.diff(bounds) > 0
    order = np.empty(num_blocks, dtype=np.int64)
    order[~is_last] = np.arange(num_blocks - num_last)
    order[is_last] = np.arange(num_blocks - num_last, num_blocks)
    return order
