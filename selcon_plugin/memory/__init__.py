"""Memory banks: one unit vector per training image or cluster, written once per step.

The loss reads a bank as a constant, and the bank is written after the optimizer step, under
``no_grad``; nothing here takes part in a backward pass. Every bank is a persistent buffer,
so that checkpoints contain it.

Shape shorthand in this module:

    B: images in the batch
    M: training images; a bank over images has a row for each
    C: global feature dimension
    S: parts; D: part feature dimension, S * D == C
    K: neighbors; an image has 1 + K positives
    T: single-row writes
"""

from selcon_plugin.memory.camera_proxy import CameraProxyMemory
from selcon_plugin.memory.cluster import ClusterMemory, ClusterUpdate
from selcon_plugin.memory.instance import InstanceMemory
from selcon_plugin.memory.tri_bank import MixtureUpdate, TriBankMemory
from selcon_plugin.memory.writes import cluster_means, write_rows

__all__ = [
    "CameraProxyMemory",
    "ClusterMemory",
    "ClusterUpdate",
    "InstanceMemory",
    "MixtureUpdate",
    "TriBankMemory",
    "cluster_means",
    "write_rows",
]
