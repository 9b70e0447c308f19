"""FastReID's optimiser with few parameter groups, in one kernel each."""

from __future__ import annotations

import inspect
from typing import Any

from fastreid.config import CfgNode
from fastreid.solver import build_optimizer as build_host_optimizer
from torch import nn
from torch.optim import Optimizer

Group = dict[str, Any]


def build_optimizer(cfg: CfgNode, model: nn.Module) -> tuple[Optimizer, list[Group]]:
    """Build FastReID's optimiser on the model's own parameters.

    FastReID makes a group of every parameter, and PyTorch steps group by group: hundreds of
    small kernels. Here parameters of the same settings share a group, which changes no
    number, and PyTorch's fused step is used where there is one.

    FastReID's own remedy, contiguous buffers of parameters, is left out: there a weight
    without a gradient has one of zeros, and weight decay still moves it.

    Args:
        cfg: Complete config.
        model: Model whose parameters are trained.

    Returns:
        The optimiser, and its parameter groups as FastReID's trainer wants them.
    """
    optimizer, _ = build_host_optimizer(cfg, model, contiguous=False)
    groups = merge_groups(optimizer.param_groups)
    kind: Any = type(optimizer)
    # A fused step divides the loss scale out by itself: clipping would come before that.
    if not cfg.SOLVER.CLIP_GRADIENTS.ENABLED and _can_fuse(kind):
        fused = [{**group, "fused": True} for group in groups]
        try:
            return kind(fused, fused=True), fused
        except RuntimeError:  # this PyTorch cannot on this device
            pass
    return kind(groups), groups


def merge_groups(groups: list[Group]) -> list[Group]:
    """Join parameter groups whose settings are equal.

    Args:
        groups: As an optimiser has them.

    Returns:
        One group for each combination of settings, in the order of their first parameters.
    """
    merged: list[Group] = []
    for group in groups:
        settings = {key: value for key, value in group.items() if key != "params"}
        for other in merged:
            if {key: value for key, value in other.items() if key != "params"} == settings:
                other["params"] += group["params"]
                break
        else:
            merged.append({**settings, "params": list(group["params"])})
    return merged


def _can_fuse(kind: type[Optimizer]) -> bool:
    base = next(c for c in kind.__mro__ if c.__module__.startswith("torch."))
    return "fused" in inspect.signature(base).parameters
