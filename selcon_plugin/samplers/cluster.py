"""``ClusterSampler``: batches composed from pseudo-labels by a planner."""

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
    _shuffled_passes,
    _whole_numbers,
)

# Values of the option "sampler" besides the names of the planners.
AUTO, STREAM_SAMPLER = "auto", "stream"
# Planners that take K images of each of P clusters.
_CLUSTERS_TIMES_INSTANCES = ("pk", "pk_camera", "proxy")


def clusters_per_batch(sampler: str, batch_size: int, num_instances: int) -> int:
    """Return how many clusters a batch needs at least.

    Args:
        sampler: Name of the sampler, not "auto".
        batch_size: Images in a batch.
        num_instances: Images of each cluster in it.

    Returns:
        P for samplers of P x K images, else 2.
    """
    return batch_size // num_instances if sampler in _CLUSTERS_TIMES_INSTANCES else 2


@dataclass(frozen=True)
class _Epoch:
    """What the batches of an epoch are made from; never changed, only replaced."""

    labels: Indices  # of the images that the planner draws from
    camids: Indices | None
    images: Indices  # the images these are
    outliers: Indices  # drawn by the quota, if any
    start_batch: int
    planner: Planner


class ClusterSampler(BatchStream):
    """Batches made up from pseudo-labels, renewed each epoch by :meth:`set_labels`.

    An epoch is a run of passes, each planned by the planner with randomness seeded by
    ``(seed, start_batch, pass)``: a resumed run that sets the same labels draws the same
    batches.

    With ``outlier_ratio``, that share of each batch are outliers: each once, then all again
    in another order; few outliers come several times in a batch. They come in blocks of
    ``num_instances``, spread evenly over the batch, so that ranks and groups of batch
    normalization have like shares. The planner fills the rest from the clustered images. In
    an epoch without outliers, or without clusters, the planner fills all.

    Args:
        batch_size: Images B in a batch, over all processes; a multiple of
            ``num_instances``.
        planner: Registered name; see :func:`planner_names`.
        num_instances: Images K of each cluster in a batch.
        group_size: For the planner ``group``: images of a cluster that stay together, at
            most.
        outlier_ratio: Share of outliers in each batch, in [0, 1); rounded to blocks of
            ``num_instances``, at least one block and at most all but one.
        seed: Seed of all draws, equal on all ranks.
        rank: This process.
        world_size: Number of processes.

    Attributes:
        start: Number of the batch at which the next iteration begins; :meth:`set_labels`
            sets it, set it to a later one to resume inside an epoch.
        outliers_per_batch: Images in a batch that ``outlier_ratio`` asks for.

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
        """Begin an epoch: its batches follow from these labels.

        Iterators that have begun keep the labels they began with.

        Args:
            labels: Cluster of each image, whole numbers of shape ``(M,)``; negative for an
                outlier. Copied.
            camids: Camera of each image, shape ``(M,)``, -1 where unknown, or None. Copied.
            start_batch: Number of the epoch's first batch, counted over the whole run.
            planner: Registered name of a planner for this epoch alone, for instance
                ``"shuffle"`` where there are no clusters to learn from.

        Raises:
            ValueError: If the labels or cameras are not ``(M,)`` whole numbers, or the
                planner finds no image to draw.
        """
        labels = _whole_numbers("labels", labels)
        if camids is not None:
            camids = _whole_numbers("camids", camids)
            if len(camids) != len(labels):
                raise ValueError(
                    f"camids ({len(camids)}) and labels ({len(labels)}) must be of the "
                    "same images"
                )
        if not len(labels):
            raise ValueError("there are no images to sample from")
        clustered, outliers = np.flatnonzero(labels >= 0), np.flatnonzero(labels < 0)
        images = np.arange(len(labels))
        if self.outliers_per_batch and len(clustered) and len(outliers):
            images = clustered  # the outliers come by quota
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
        next(self._batches_of(epoch))  # what cannot be planned fails here, not in a loader
        self._epoch = epoch
        self.start = start_batch

    def batches(self, start: int) -> Iterator[Indices]:
        """Draw the global batches ``start``, ``start + 1``, ...; see the base class.

        Args:
            start: Number of the first batch, in the epoch of the last labels set.

        Returns:
            The batches.

        Raises:
            RuntimeError: If no labels have been set.
            ValueError: If the batch lies before the epoch.
        """
        epoch = self._epoch
        if epoch is None:
            raise RuntimeError("call set_labels() before drawing the first batch")
        if start < epoch.start_batch:
            raise ValueError(
                f"batch {start} lies before batch {epoch.start_batch}, at which the "
                "labels were set: set the labels of its epoch"
            )
        return itertools.islice(self._batches_of(epoch), start - epoch.start_batch, None)

    def _batches_of(self, epoch: _Epoch) -> Iterator[Indices]:
        if len(epoch.outliers):
            return self._with_outliers(epoch)
        return self._planned(epoch, self.batch_size)

    def _with_outliers(self, epoch: _Epoch) -> Iterator[Indices]:
        num_outliers = self.outliers_per_batch
        drawn = _shuffled_passes(
            len(epoch.outliers),
            num_outliers,
            0,
            # The 1 keeps this stream apart from the planner's.
            lambda number: np.random.default_rng((self.seed, epoch.start_batch, number, 1)),
        )
        for planned in self._planned(epoch, self.batch_size - num_outliers):
            both = np.concatenate([planned, epoch.outliers[next(drawn)]])
            yield both.reshape(-1, self.num_instances)[self._block_order].reshape(-1)

    def _planned(self, epoch: _Epoch, batch_size: int) -> Iterator[Indices]:
        settings = PlanSettings(batch_size, self.num_instances, self.group_size)
        for number in itertools.count():
            rng = np.random.default_rng((self.seed, epoch.start_batch, number))
            plan = epoch.planner(epoch.labels, epoch.camids, settings, rng)
            if not len(plan):
                raise ValueError("the planner made a pass without a batch")
            yield from epoch.images[plan]


def _quota(outlier_ratio: float, batch_size: int, num_instances: int) -> int:
    """Return the outliers in a batch: whole blocks, at least one, not all."""
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
    """Order blocks such that the last ones are spread evenly among the others."""
    bounds = np.arange(num_blocks + 1) * num_last // num_blocks
    is_last = np.diff(bounds) > 0
    order = np.empty(num_blocks, dtype=np.int64)
    order[~is_last] = np.arange(num_blocks - num_last)
    order[is_last] = np.arange(num_blocks - num_last, num_blocks)
    return order
