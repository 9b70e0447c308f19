"""Losses as pure functions, some also as modules that hold the settings."""

from selcon_plugin.losses.camera_proxy import (
    associate_proxies,
    inter_camera_loss,
    intra_camera_loss,
    online_association_loss,
)
from selcon_plugin.losses.cluster_contrastive import (
    ClusterContrastiveLoss,
    cluster_contrastive_loss,
)
from selcon_plugin.losses.instance_contrastive import (
    class_similarity,
    instance_contrastive_loss,
)
from selcon_plugin.losses.priority_contrastive import priority_contrastive_loss
from selcon_plugin.losses.sample_to_instance import (
    sample_constraint_loss,
    sample_to_instance_loss,
)
from selcon_plugin.losses.selective_contrastive import (
    SelectiveContrastiveLoss,
    positive_weights,
    selective_contrastive_loss,
)
from selcon_plugin.losses.softmax_triplet import softmax_triplet_loss

__all__ = [
    "ClusterContrastiveLoss",
    "SelectiveContrastiveLoss",
    "associate_proxies",
    "class_similarity",
    "cluster_contrastive_loss",
    "instance_contrastive_loss",
    "inter_camera_loss",
    "intra_camera_loss",
    "online_association_loss",
    "positive_weights",
    "priority_contrastive_loss",
    "sample_constraint_loss",
    "sample_to_instance_loss",
    "selective_contrastive_loss",
    "softmax_triplet_loss",
]
