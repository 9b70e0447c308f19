"""Freezing of layers in the first steps of a training."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastreid.config import CfgNode
from fastreid.engine.hooks import LayerFreeze
from torch import nn

from selcon_plugin.values import listed


def freezes_layers(cfg: CfgNode) -> bool:
    """Return whether a config freezes layers in the first steps."""
    return bool(cfg.MODEL.FREEZE_LAYERS) and cfg.SOLVER.FREEZE_ITERS > 0


class FreezeHook(LayerFreeze):
    """FastReID's hook, which keeps the frozen layers in evaluation mode in every step.

    FastReID's own sets the mode once, and the next clustering or evaluation puts the whole
    network back into training mode; a run that resumes after it would differ.

    Args:
        model: Model in training.
        freeze_layers: Names of its children, such as ``"backbone"``.
        freeze_iters: Number of steps in which they are frozen.
    """

    def before_step(self) -> None:
        """Freeze the layers, or release them after the last frozen step."""
        super().before_step()
        if self.is_frozen:
            for name, module in self.model.named_children():
                if name in self.freeze_layers:
                    module.eval()


def check_layers(cfg: CfgNode, model: nn.Module) -> None:
    """Refuse names of layers of which the model has none.

    Args:
        cfg: Complete config.
        model: Model in training.

    Raises:
        ValueError: If no entry of ``MODEL.FREEZE_LAYERS`` matches a parameter.
    """
    layers = list(cfg.MODEL.FREEZE_LAYERS)
    if layers and unmatched_layers(model, layers) == layers:
        parts = dict.fromkeys(
            name.partition(".")[0] for name, _ in model.named_parameters()
        )
        raise ValueError(
            f"MODEL.FREEZE_LAYERS {layers!r} matches no parameter of the model, whose "
            f"parts are {listed(parts)}: name a part, or the start of a parameter's name"
        )


def unmatched_layers(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """Return the entries of ``MODEL.FREEZE_LAYERS`` that match no parameter of a model.

    Args:
        model: Model in training.
        layers: Patterns of the start of a parameter's name, as in FastReID.
    """
    names = [name for name, _ in model.named_parameters()]
    return [layer for layer in layers if not any(re.match(layer, name) for name in names)]
