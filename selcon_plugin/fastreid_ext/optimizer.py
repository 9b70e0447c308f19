"""FastReID's optimizer with few parameter groups, each of which runs in one kernel."""

from __future__ import annotations

import inspect
from typing import Any

from fastreid.config import CfgNode
from fastreid.solver import build_optimizer as build_host_optimizer
from torch import nn
from torch.optim import Optimizer

from selcon_plugin.fastreid_ext.freezing import check_layers

Group = dict[str, Any]


def build_optimizer(cfg: CfgNode, model: nn.Module) -> tuple[Optimizer, list[Group]]:
    """Build FastReID's optimizer on the model's own parameters.

    FastReID creates one group per parameter, and PyTorch steps group by group, which takes
    hundreds of small kernels. Here parameters with the same settings share a group, which
    changes no value, and PyTorch's fused step is used where it exists.

    FastReID's own remedy, contiguous parameter buffers, is not used: there a weight without
    a gradient has a gradient of zeros, so that weight decay still changes it.

    Args:
        cfg: Complete config.
        model: Model whose parameters are trained.

    Returns:
        The optimizer, and its parameter groups as FastReID's trainer expects them.

    Raises:
        ValueError: If ``MODEL.FREEZE_LAYERS`` names no layer of the model.
    """  # noqa: DOC502  (raised by the function called here)
    check_layers(cfg, model)
    optimizer, _ = build_host_optimizer(cfg, model, contiguous=False)
    groups = merge_groups(optimizer.param_groups)
    merged = _build(type(optimizer), groups, clips=cfg.SOLVER.CLIP_GRADIENTS.ENABLED)
    # Checkpoints may contain FastReID's own groups.
    merged.register_load_state_dict_pre_hook(_with_merged_groups)
    return merged, merged.param_groups


def _build(kind: Any, groups: list[Group], *, clips: bool) -> Optimizer:
    # A fused step unscales the gradients itself, but clipping would come before that.
    if not clips and _can_fuse(kind):
        try:
            fused: Optimizer = kind([{**g, "fused": True} for g in groups], fused=True)
        except RuntimeError:  # this PyTorch has no fused step on this device
            pass
        else:
            return fused
    optimizer: Optimizer = kind(groups)
    return optimizer


def _with_merged_groups(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    groups = merge_groups(state["param_groups"])
    own = optimizer.param_groups
    if len(groups) == len(own):
        for group, present in zip(groups, own, strict=True):
            group["fused"] = present.get("fused")
    return {**state, "param_groups": groups}


def merge_groups(groups: list[Group]) -> list[Group]:
    """Join parameter groups with equal settings.

    Args:
        groups: Parameter groups of an optimizer.

    Returns:
        One group for each combination of settings, in the order of their first parameters.
    """
    merged: list[Group] = []
    for group in groups:
        settings = _settings(group)
        same = next((other for other in merged if _settings(other) == settings), None)
        if same is None:
            merged.append({**group, "params": list(group["params"])})
        else:
            same["params"] += group["params"]
    return merged


def _settings(group: Group) -> Group:
    return {key: value for key, value in group.items() if key != "params"}


def _can_fuse(kind: type[Optimizer]) -> bool:
    base = next(c for c in kind.__mro__ if c.__module__.startswith("torch."))
    return "fused" in inspect.signature(base).parameters
