"""Samplers: which images make up a batch. Seeded, resumable and right under DDP.

A sampler is an endless stream of *global* batches, those of all processes together. Batch n
is a function of the settings, the labels and n alone, so that neither the number of loader
workers, nor the number of processes, nor a resumed run changes what the model sees. Of each
batch, rank r of W gets the r-th of W contiguous slices: the K images of a cluster, which
lie side by side, and the groups of batch normalisation stay on one rank, if its slice is a
multiple of them.

What a sampler yields is a :class:`SampleKey` and not a bare index: the place in the stream
seeds the augmentation of that very sample.

:class:`ClusterSampler` leaves the make-up of a batch to a *planner*, found by its name:

=============  =======================================================================
``pk_camera``  P clusters x K images, of each cluster from different cameras
``pk``         P clusters x K images
``proxy``      P (cluster, camera) pairs x K images
``group``      whole clusters, one after the other (GroupSampling)
``shuffle``    all images, outliers too, whatever their cluster
=============  =======================================================================

Shape shorthand in this module:

    M: training images
    B: images in a global batch
    K: images of each cluster in a batch; P: clusters in a batch, P * K == B
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import Sampler

from selcon_plugin.registry import Registry

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SampleKey:
    """One draw of a sampler.

    Attributes:
        index: Image, 0..M-1.
        position: Place of the draw in the whole run's stream, counted over all processes:
            B * number of the batch + place in the batch.
    """

    index: int
    position: int


class BatchStream(Sampler[SampleKey], ABC):
    """Base of the samplers: an endless stream of global batches, dealt to the ranks.

    Args:
        batch_size: Images B in a batch, over all processes.
        seed: Seed of all draws, equal on all ranks.
        rank: This process.
        world_size: Number of processes W.

    Attributes:
        start: Number of the batch at which the next iteration begins; set it to resume.

    Raises:
        ValueError: If the batch is not a positive multiple of the number of processes.
    """

    def __init__(
        self, *, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"batch_size ({batch_size}, over all processes) must be a positive "
                f"multiple of the number of processes ({world_size})"
            )
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = 0

    @abstractmethod
    def batches(self, start: int) -> Iterator[Indices]:
        """Draw the global batches ``start``, ``start + 1``, ... without end.

        Args:
            start: Number of the first batch.

        Yields:
            Images of one batch, shape ``(B,)``; the same on all ranks.
        """

    def __iter__(self) -> Iterator[SampleKey]:
        share = self.batch_size // self.world_size
        first = self.rank * share
        start = self.start
        for number, images in enumerate(self.batches(start), start):
            position = number * self.batch_size + first
            for place, index in enumerate(images[first : first + share].tolist()):
                yield SampleKey(index, position + place)


def _shuffled_passes(
    num_images: int,
    batch_size: int,
    start: int,
    generator_of_pass: Callable[[int], np.random.Generator],
) -> Iterator[Indices]:
    """Cut endless shuffled passes over all images into batches; begin at any of them."""
    number, place = divmod(start * batch_size, num_images)
    waiting = generator_of_pass(number).permutation(num_images)[place:]
    while True:
        while len(waiting) < batch_size:
            number += 1
            order = generator_of_pass(number).permutation(num_images)
            waiting = np.concatenate([waiting, order])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


class StreamSampler(BatchStream):
    """Shuffled passes over all images, one after the other.

    Position n of the stream is place n % M of pass n // M, a permutation seeded by ``(seed,
    pass)``: it is known without drawing what came before.

    Args:
        num_images: Images M.
        batch_size: Images B in a batch, over all processes; 1 makes it a plain stream of
            images.
        seed: Seed of the permutations, equal on all ranks.
        rank: This process.
        world_size: Number of processes.

    Raises:
        ValueError: If there are no images, or the batch is not a multiple of the number of
            processes.

    Example:
        >>> stream = iter(StreamSampler(3, seed=0))
        >>> sorted(next(stream).index for _ in range(3))
        [0, 1, 2]
    """

    def __init__(
        self,
        num_images: int,
        *,
        batch_size: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
        if num_images < 1:
            raise ValueError("there are no images to sample from")
        self.num_images = num_images

    def batches(self, start: int) -> Iterator[Indices]:
        """Draw the global batches ``start``, ``start + 1``, ...; see the base class."""
        return _shuffled_passes(
            self.num_images,
            self.batch_size,
            start,
            lambda number: np.random.default_rng((self.seed, number)),
        )


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """Sizes that a planner keeps to.

    Attributes:
        batch_size: Images in a batch, a multiple of ``num_instances``.
        num_instances: Images K of each cluster in a batch.
        group_size: Images of a cluster that ``group`` keeps together, at most.
    """

    batch_size: int
    num_instances: int
    group_size: int


class Planner(Protocol):
    """Plans one pass over the images: a pure function of its arguments."""

    def __call__(
        self,
        labels: Indices,
        camids: Indices | None,
        settings: PlanSettings,
        rng: np.random.Generator,
        /,
    ) -> Indices:
        """Make up the batches of a pass.

        Args:
            labels: Cluster of each image, shape ``(M,)``; negative for an outlier.
            camids: Camera of each image, shape ``(M,)``, -1 where unknown, or None.
            settings: Sizes.
            rng: All randomness comes from it.

        Returns:
            Images, shape ``(number of batches, batch_size)``, at least one batch.

        Raises:
            ValueError: If no image can be drawn.
        """


_PLANNERS: Registry[Planner] = Registry("planner")
PlannerFunction = TypeVar("PlannerFunction", bound=Planner)


def register_planner(name: str) -> Callable[[PlannerFunction], PlannerFunction]:
    """Decorator: make a planner available to :class:`ClusterSampler` under ``name``."""
    return _PLANNERS.register(name)


def planner_names() -> list[str]:
    """Return the names of all registered planners."""
    return _PLANNERS.names()


def planner_named(name: str) -> Planner:
    """Return the planner registered under ``name``."""
    return _PLANNERS[name]


def _shuffled_clusters(
    labels: Indices, rng: np.random.Generator
) -> tuple[Indices, Indices, Indices]:
    """Shuffle the images inside each cluster and the clusters among themselves.

    Returns:
        The images, cluster after cluster; and of each cluster its first place and its size.

    Raises:
        ValueError: If there are only outliers.
    """
    members = np.flatnonzero(labels >= 0)
    if not len(members):
        raise ValueError(
            f"all {len(labels)} images are outliers (label -1), and this planner draws "
            "from clusters alone: the planner 'shuffle' draws them all"
        )
    rng.shuffle(members)
    _, cluster = np.unique(labels[members], return_inverse=True)
    rank = rng.permutation(cluster.max() + 1)[cluster]
    members = members[np.argsort(rank, kind="stable")]
    size = np.bincount(rank)
    return members, np.cumsum(size) - size, size


@register_planner("pk_camera")
def _identities_across_cameras(
    labels: Indices,
    camids: Indices | None,
    settings: PlanSettings,
    rng: np.random.Generator,
) -> Indices:
    """Plan batches of P clusters x K images, of each cluster from different cameras.

    The rule of the field's cluster-based methods ("RandomMultipleGallerySampler"): of each
    cluster a random image, the anchor, and K - 1 images from other cameras than the
    anchor's. Where there are fewer than K - 1 of these, they come again in turn. A cluster
    that has none, or whose anchor's camera is unknown, gives K of its images without regard
    to cameras; fewer than K come again in turn. An image of unknown camera counts as being
    from another camera than any known one. One thing differs: every cluster gives exactly K
    images, where the common implementation takes one of a single-image cluster and so
    shifts the boundaries of all later batches.

    Clusters come in random order, each once a pass. The last batch is filled up with the
    first clusters of the pass, and a batch wider than the number of clusters goes round
    them several times; a cluster that comes again gives other images, as far as it has
    them.

    Returns:
        Shape ``(ceil(clusters / P), batch_size)``; the K images of a cluster lie side by
        side, the anchor first.
    """
    num_instances = settings.num_instances
    members, start, size = _shuffled_clusters(labels, rng)
    clusters_per_batch = settings.batch_size // num_instances
    num_slots = -(-len(size) // clusters_per_batch) * clusters_per_batch
    # A slot is K places of a batch. Its candidates are all images of its cluster; when the
    # cluster comes for the n-th time, they begin n * K further on.
    turn, cluster = np.divmod(np.arange(num_slots), len(size))
    pool = size[cluster]
    first = np.cumsum(pool) - pool
    slot = np.repeat(np.arange(num_slots), pool)
    place = np.arange(len(slot)) - first[slot]
    turned = (place + turn[slot] * num_instances) % pool[slot]
    candidates = members[start[cluster][slot] + turned]
    # The images are taken from the anchor on, or 1 behind it where all others are to come
    # from other cameras.
    behind = np.zeros(num_slots, dtype=np.int64)
    if camids is not None:
        anchor_camera = camids[candidates[first]][slot]
        other = (camids[candidates] != anchor_camera) & (anchor_camera >= 0)
        # In each slot: the anchor, images of other cameras, images of its own.
        kind = np.where(place == 0, 0, np.where(other, 1, 2))
        candidates = candidates[np.argsort(3 * slot + kind, kind="stable")]
        num_others = np.bincount(slot[other], minlength=num_slots)
        behind = np.minimum(num_others, 1)
        pool = np.where(num_others, num_others, pool)
    step = np.arange(num_instances) - behind[:, None]
    picks = (first + behind)[:, None] + step % pool[:, None]
    picks[:, 0] = first  # the anchor
    planned: Indices = candidates[picks].reshape(-1, settings.batch_size)
    return planned


@register_planner("pk")
def _identities(
    labels: Indices,
    camids: Indices | None,
    settings: PlanSettings,
    rng: np.random.Generator,
) -> Indices:
    """Plan batches of P clusters x K images: ``pk_camera`` where no camera is known."""
    return _identities_across_cameras(labels, None, settings, rng)


@register_planner("proxy")
def _proxies(
    labels: Indices,
    camids: Indices | None,
    settings: PlanSettings,
    rng: np.random.Generator,
) -> Indices:
    """Plan batches of P camera proxies x K images (CAP, Wang et al., AAAI 2021).

    A proxy is the images that one camera has of one cluster; each comes once a pass, as the
    clusters do under ``pk``. The images of unknown camera are one proxy of their cluster;
    without cameras every cluster is one.

    Returns:
        Shape ``(ceil(proxies / P), batch_size)``.
    """
    if camids is not None:
        _, camera = np.unique(camids, return_inverse=True)
        labels = np.where(labels >= 0, labels * (camera.max() + 1) + camera, -1)
    return _identities(labels, None, settings, rng)


@register_planner("group")
def _groups(
    labels: Indices,
    camids: Indices | None,
    settings: PlanSettings,
    rng: np.random.Generator,
) -> Indices:
    """Plan batches of whole clusters (GroupSampling, Han et al., IEEE TIP 2022).

    The images of each cluster are shuffled and cut into groups of at most ``group_size``;
    the groups are shuffled and laid end to end, those of single-image clusters last; the
    line is cut into batches, and the batches are shuffled. The line's last batch is filled
    up from its beginning. Outliers are not drawn: those of the paper are single-image
    clusters.

    Returns:
        Shape ``(ceil(clustered images / batch_size), batch_size)``.
    """
    members, start, size = _shuffled_clusters(labels, rng)
    place = np.arange(len(members)) - np.repeat(start, size)
    begins = place % settings.group_size == 0
    group = np.cumsum(begins) - 1
    rank = rng.permutation(group[-1] + 1)
    rank[np.repeat(size, size)[begins] == 1] += len(rank)
    line = members[np.argsort(rank[group], kind="stable")]
    return rng.permutation(_cut(line, settings.batch_size))


@register_planner("shuffle")
def _all_images(
    labels: Indices,
    camids: Indices | None,
    settings: PlanSettings,
    rng: np.random.Generator,
) -> Indices:
    """Plan batches of all images, outliers too, in random order.

    The last batch is filled up with the first images of the pass.

    Returns:
        Shape ``(ceil(M / batch_size), batch_size)``.
    """
    return _cut(rng.permutation(len(labels)), settings.batch_size)


def _cut(line: Indices, batch_size: int) -> Indices:
    """Cut into batches; the last one goes on at the beginning, round and round."""
    return np.resize(line, (-(-len(line) // batch_size), batch_size))


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

    With ``outlier_share``, that share of each batch are outliers: each once, then all again
    in another order; few outliers come several times in a batch. They come in blocks of
    ``num_instances``, spread evenly over the batch, so that ranks and groups of batch
    normalisation have like shares. The planner fills the rest from the clustered images. In
    an epoch without outliers, or without clusters, the planner fills all.

    Args:
        batch_size: Images B in a batch, over all processes; a multiple of
            ``num_instances``.
        planner: Registered name; see :func:`planner_names`.
        num_instances: Images K of each cluster in a batch.
        group_size: For the planner ``group``: images of a cluster that stay together, at
            most.
        outlier_share: Share of outliers in each batch, in [0, 1); rounded to blocks of
            ``num_instances``, at least one block and at most all but one.
        seed: Seed of all draws, equal on all ranks.
        rank: This process.
        world_size: Number of processes.

    Attributes:
        start: Number of the batch at which the next iteration begins; :meth:`set_labels`
            sets it, set it to a later one to resume inside an epoch.
        outliers_per_batch: Images in a batch that ``outlier_share`` asks for.

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
        outlier_share: float = 0.0,
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
        self.outliers_per_batch = _quota(outlier_share, batch_size, num_instances)
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


def _quota(outlier_share: float, batch_size: int, num_instances: int) -> int:
    """Return the outliers in a batch: whole blocks, at least one, not all."""
    if not 0 <= outlier_share < 1:
        raise ValueError(f"outlier_share must lie in [0, 1), got {outlier_share}")
    if outlier_share == 0:
        return 0
    num_blocks = batch_size // num_instances
    if num_blocks < 2:
        raise ValueError(
            f"outlier_share ({outlier_share}) needs a batch_size of 2 * num_instances "
            f"({2 * num_instances}) or more, got {batch_size}"
        )
    blocks = round(outlier_share * num_blocks)
    return min(max(blocks, 1), num_blocks - 1) * num_instances


def _spread(num_blocks: int, num_last: int) -> Indices:
    """Order blocks such that the last ones are spread evenly among the others."""
    bounds = np.arange(num_blocks + 1) * num_last // num_blocks
    is_last = np.diff(bounds) > 0
    order = np.empty(num_blocks, dtype=np.int64)
    order[~is_last] = np.arange(num_blocks - num_last)
    order[is_last] = np.arange(num_blocks - num_last, num_blocks)
    return order


def _whole_numbers(name: str, values: Tensor | ArrayLike) -> Indices:
    array = np.asarray(values.cpu() if isinstance(values, Tensor) else values)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be whole numbers of shape (M,), got {array.dtype} of shape "
            f"{array.shape}"
        )
    return array.astype(np.int64, copy=False)
