"""Methods in the state after the first clustering of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from helpers.features import units
from selcon_plugin.clustering import PseudoLabels
from selcon_plugin.features import Embeddings
from selcon_plugin.methods import build_method


def prepared_method(
    name: str,
    dim: int,
    labels: Sequence[int] | PseudoLabels,
    camids: Tensor | None = None,
    *,
    device: str = "cpu",
    **options: Any,
) -> Any:
    """Build a method and prepare it with ``units(M, dim, seed=0)``, one row per label."""
    if not isinstance(labels, PseudoLabels):
        labels = PseudoLabels.numbered(labels)
    count = len(labels.labels)
    method = build_method(name, count, dim, **options).to(device)
    features = Embeddings(units(count, dim, seed=0).to(device))
    method.prepare(features, None if camids is None else camids.to(device), labels)
    return method
