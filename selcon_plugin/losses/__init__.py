"""Losses: pure functions, each with a module form that holds the settings."""

from selcon_plugin.losses.selective_contrastive import (
    SelectiveContrastiveLoss,
    positive_weights,
    selective_contrastive_loss,
)

__all__ = ["SelectiveContrastiveLoss", "positive_weights", "selective_contrastive_loss"]
