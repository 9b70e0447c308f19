"""Random labels, and helpers to run samplers and planners on them."""

import itertools

import numpy as np

from selcon_plugin.samplers.cluster import ClusterSampler
from selcon_plugin.samplers.planners import (
    PlanSettings,
    planner_named,
)

CLUSTER_PLANNERS = ["group", "pk", "pk_camera", "proxy"]


def draw(sampler, count):
    return list(itertools.islice(sampler, count))


def batches_of(sampler, start, count):
    return np.stack(draw(sampler.batches(start), count))


def clusters(num_images=300, seed=0):
    """Return unequal clusters, three of them singletons, outliers, and unknown cameras."""
    rng = np.random.default_rng(seed)
    labels = np.minimum(rng.geometric(0.12, num_images), 21) - 2
    labels[:23] = np.arange(23)
    order = rng.permutation(num_images)
    return labels[order], rng.integers(-1, 4, num_images)


def plan(name, labels, camids=None, *, seed=0, batch_size=8, num_instances=4, group_size=5):
    return planner_named(name)(
        np.asarray(labels),
        None if camids is None else np.asarray(camids),
        PlanSettings(batch_size, num_instances, group_size),
        np.random.default_rng(seed),
    )


def cluster_sampler(labels, camids=None, start_batch=0, **settings):
    sampler = ClusterSampler(**{"batch_size": 16, "num_instances": 4} | settings)
    sampler.set_labels(labels, camids, start_batch)
    return sampler
