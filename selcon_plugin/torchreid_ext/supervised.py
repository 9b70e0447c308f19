"""Refusal of torchreid's engines for supervised training, which a script may have kept."""

from __future__ import annotations

import functools
from typing import Any

from selcon_plugin.compat.shared import PATCHED
from selcon_plugin.compat.torchreid import import_torchreid
from selcon_plugin.engine.network import SUPERVISED
from selcon_plugin.features import Embeddings


def refuse_supervised_losses() -> None:
    """Let torchreid's losses of identities refuse the features of a label-free model.

    Otherwise they fail with an error about shapes, or take features for logits.
    """
    engine: Any = import_torchreid().engine.Engine
    original = engine.compute_loss
    if hasattr(original, PATCHED):
        return

    @functools.wraps(original)
    def compute_loss(self: Any, criterion: Any, outputs: Any, targets: Any) -> Any:
        if isinstance(outputs, Embeddings):
            raise RuntimeError(SUPERVISED)
        return original(self, criterion, outputs, targets)

    setattr(compute_loss, PATCHED, True)
    engine.compute_loss = compute_loss
