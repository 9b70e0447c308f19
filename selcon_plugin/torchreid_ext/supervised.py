"""Refusal of torchreid's engines for supervised training, which a script may have kept."""

from __future__ import annotations

import functools
from typing import Any

from selcon_plugin.compat.shared import PATCHED
from selcon_plugin.compat.torchreid import import_torchreid
from selcon_plugin.engine.network import EmbeddingNetwork
from selcon_plugin.engine.supervision import SUPERVISED


def refuse_supervised_steps() -> None:
    """Let torchreid's engines for identities refuse a model that trains without them.

    Otherwise they fail with an error about shapes, or take features for logits.
    """
    engines: Any = import_torchreid().engine
    for engine in (engines.ImageSoftmaxEngine, engines.ImageTripletEngine):
        if not hasattr(engine.forward_backward, PATCHED):
            engine.forward_backward = _refusing(engine.forward_backward)


def _refusing(original: Any) -> Any:
    @functools.wraps(original)
    def forward_backward(self: Any, data: Any) -> Any:
        # nn.DataParallel contains the model.
        if isinstance(getattr(self.model, "module", self.model), EmbeddingNetwork):
            raise RuntimeError(SUPERVISED)
        return original(self, data)

    setattr(forward_backward, PATCHED, True)
    return forward_backward
