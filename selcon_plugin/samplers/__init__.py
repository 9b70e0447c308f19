"""Batch samplers that are seeded, resumable and correct under DDP.

A sampler is an endless stream of *global* batches, each shared by all processes. Batch n
depends only on the settings, the labels and n, so the number of loader workers, the number
of processes and a resumed run do not change the training samples. Of each batch, rank r of
W gets the r-th of W contiguous slices: the K images of a cluster, which are contiguous, and
the groups of batch normalization stay on one rank if its slice is a multiple of them.

A sampler yields a :class:`SampleKey` instead of a bare index: the position in the stream
seeds the augmentation of the sample.

:class:`ClusterSampler` composes batches by a *planner*, selected by name:

=============  =======================================================================
``pk_camera``  P clusters x K images, with the K images from different cameras
``pk``         P clusters x K images
``proxy``      P (cluster, camera) pairs x K images
``group``      whole clusters, one after the other (GroupSampling)
``shuffle``    all images including outliers, regardless of their cluster
=============  =======================================================================

Shape shorthand in this module:

    M: training images
    B: images in a global batch
    K: images of each cluster in a batch; P: clusters in a batch, P * K == B
"""

from selcon_plugin.samplers.cluster import ClusterSampler
from selcon_plugin.samplers.planners import (
    Planner,
    PlanSettings,
    planner_names,
    register_planner,
)
from selcon_plugin.samplers.stream import BatchStream, SampleKey, StreamSampler

__all__ = [
    "BatchStream",
    "ClusterSampler",
    "PlanSettings",
    "Planner",
    "SampleKey",
    "StreamSampler",
    "planner_names",
    "register_planner",
]
