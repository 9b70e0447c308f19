"""Samplers: which images make up a batch. Seeded, resumable and right under DDP.

A sampler is an endless stream of *global* batches, those of all processes together. Batch n
is a function of the settings, the labels and n alone, so that neither the number of loader
workers, nor the number of processes, nor a resumed run changes what the model sees. Of each
batch, rank r of W gets the r-th of W contiguous slices: the K images of a cluster, which
lie side by side, and the groups of batch normalization stay on one rank, if its slice is a
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
