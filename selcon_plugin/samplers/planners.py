"""Planners: how the images of each cluster are divided into batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from selcon_plugin.registry import Registry
from selcon_plugin.samplers.stream import Indices


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
