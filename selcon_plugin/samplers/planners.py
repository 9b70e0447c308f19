"""Planners, which divide the images of the clusters into batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from selcon_plugin.registry import Registry
from selcon_plugin.samplers.stream import Indices


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """Batch sizes for a planner.

    Attributes:
        batch_size: Images in a batch, a multiple of ``num_instances``.
        num_instances: Images K of each cluster in a batch.
        group_size: Largest number of images of a cluster that ``group`` keeps together.
    """

    batch_size: int
    num_instances: int
    group_size: int


class Planner(Protocol):
    """Function that plans one pass over the images and depends only on its arguments."""

    def __call__(
        self,
        labels: Indices,
        camids: Indices | None,
        settings: PlanSettings,
        rng: np.random.Generator,
        /,
    ) -> Indices:
        """Compose the batches of a pass.

        Args:
            labels: Cluster of each image, shape ``(M,)``; negative for an outlier.
            camids: Camera of each image, shape ``(M,)``, -1 where unknown, or None.
            settings: Batch sizes.
            rng: Only source of randomness.

        Returns:
            Image indices, shape ``(number of batches, batch_size)``, at least one batch.

        Raises:
            ValueError: If no image can be sampled.
        """


_PLANNERS: Registry[Planner] = Registry("planner")


PlannerFunction = TypeVar("PlannerFunction", bound=Planner)


def register_planner(name: str) -> Callable[[PlannerFunction], PlannerFunction]:
    """Return a decorator that registers a planner for :class:`ClusterSampler`."""
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
    """Shuffle the images within each cluster, and the order of the clusters.

    Returns:
        The images by cluster, and the start and size of each cluster.

    Raises:
        ValueError: If there are only outliers.
    """
    members = np.flatnonzero(labels >= 0)
    if not len(members):
        raise ValueError(
            f"all {len(labels)} images are outliers (label -1), and this planner samples "
            "only clustered images: use the planner 'shuffle', which samples all images"
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
    """Plan batches of P clusters x K images, with the K images from different cameras.

    This is the rule of the usual cluster-based methods ("RandomMultipleGallerySampler"):
    from each cluster it samples a random image, the anchor, and K - 1 images from cameras
    other than the anchor's. If there are fewer than K - 1 of these, they are repeated
    cyclically. From a cluster without such images, or with an anchor of unknown camera, K
    images are sampled regardless of cameras; fewer than K are repeated cyclically. An image
    of unknown camera counts as one from a different camera than any known one. There is one
    difference: every cluster contributes exactly K images, while the common implementation
    takes one image of a singleton and thereby shifts the boundaries of all later batches.

    Clusters are sampled in random order, each once per pass. The last batch is filled with
    the first clusters of the pass, and a batch with more places than clusters repeats the
    clusters cyclically; a repeated cluster contributes different images, as far as it has
    them.

    Returns:
        Shape ``(ceil(clusters / P), batch_size)``; the K images of a cluster are
        contiguous, with the anchor first.
    """
    num_instances = settings.num_instances
    members, start, size = _shuffled_clusters(labels, rng)
    clusters_per_batch = settings.batch_size // num_instances
    num_slots = -(-len(size) // clusters_per_batch) * clusters_per_batch
    # A slot is K places of a batch. Its candidates are all images of its cluster; at the
    # n-th repetition of the cluster, they are rotated by n * K.
    turn, cluster = np.divmod(np.arange(num_slots), len(size))
    pool = size[cluster]
    first = np.cumsum(pool) - pool
    slot = np.repeat(np.arange(num_slots), pool)
    place = np.arange(len(slot)) - first[slot]
    rotated = (place + turn[slot] * num_instances) % pool[slot]
    candidates = members[start[cluster][slot] + rotated]
    # Images are taken from the anchor on, or from 1 behind it if the others have to come
    # from other cameras.
    behind = np.zeros(num_slots, dtype=np.int64)
    if camids is not None:
        anchor_camera = camids[candidates[first]][slot]
        other = (camids[candidates] != anchor_camera) & (anchor_camera >= 0)
        # Order within a slot: the anchor, images of other cameras, images of its camera.
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
    """Plan batches of P clusters x K images: ``pk_camera`` without known cameras."""
    return _identities_across_cameras(labels, None, settings, rng)


@register_planner("proxy")
def _proxies(
    labels: Indices,
    camids: Indices | None,
    settings: PlanSettings,
    rng: np.random.Generator,
) -> Indices:
    """Plan batches of P camera proxies x K images (CAP, Wang et al., AAAI 2021).

    A proxy consists of the images of one cluster from one camera; each proxy is sampled
    once per pass, like the clusters under ``pk``. Images of unknown camera form one proxy
    of their cluster; without cameras every cluster is a proxy.

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

    The images of each cluster are shuffled and split into groups of at most ``group_size``;
    the groups are shuffled and concatenated, with singletons last; the sequence is split
    into batches, and the batches are shuffled. The last batch of the sequence is filled
    from its beginning. Outliers are not sampled: in the paper they are singletons.

    Returns:
        Shape ``(ceil(clustered images / batch_size), batch_size)``.
    """
    members, start, size = _shuffled_clusters(labels, rng)
    place = np.arange(len(members)) - np.repeat(start, size)
    is_first = place % settings.group_size == 0
    group = np.cumsum(is_first) - 1
    rank = rng.permutation(group[-1] + 1)
    rank[np.repeat(size, size)[is_first] == 1] += len(rank)
    sequence = members[np.argsort(rank[group], kind="stable")]
    return rng.permutation(_split_into_batches(sequence, settings.batch_size))


@register_planner("shuffle")
def _all_images(
    labels: Indices,
    camids: Indices | None,
    settings: PlanSettings,
    rng: np.random.Generator,
) -> Indices:
    """Plan batches of all images, including outliers, in random order.

    The last batch is filled with the first images of the pass.

    Returns:
        Shape ``(ceil(M / batch_size), batch_size)``.
    """
    return _split_into_batches(rng.permutation(len(labels)), settings.batch_size)


def _split_into_batches(sequence: Indices, batch_size: int) -> Indices:
    """Split into batches; the last one is filled cyclically from the beginning."""
    return np.resize(sequence, (-(-len(sequence) // batch_size), batch_size))
