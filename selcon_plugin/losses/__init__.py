"""Losses: pure functions, each with a module form that holds the settings."""

from selcon_plugin.losses.cluster_contrastive import (
    ClusterContrastiveLoss,
    cluster_contrastive_loss,
)
from selcon_plugin.losses.instance_contrastive import (
    class_similarity,
    instance_contrastive_loss,
)
from selcon_plugin.losses.priority_contrastive import priority_contrastive_loss
from selcon_plugin.losses.selective_contrastive import (
    SelectiveContrastiveLoss,
    positive_weights,
    selective_contrastive_loss,
)

__all__ = [
    "ClusterContrastiveLoss",
    "SelectiveContrastiveLoss",
    "class_similarity",
    "cluster_contrastive_loss",
    "instance_contrastive_loss",
    "positive_weights",
    "priority_contrastive_loss",
    "selective_contrastive_loss",
]
